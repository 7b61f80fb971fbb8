"""docs/results.md, made from what is stored."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from datetime import timedelta
from textwrap import shorten

from benchmarks.markdown import NONE, number, table
from benchmarks.quality.compare import COMPARED, Kept, floor_of, kept_of
from benchmarks.quality.jobs import (
    ADAPTORS,
    CONSTANT,
    CONTROL,
    CURVE,
    PIXELS,
    ROWS,
    STUDENT,
    SWITCHES,
    Row,
    rows_of,
)
from benchmarks.quality.store import Record, Stored
from benchmarks.quality.verdicts import verdicts
from benchmarks.quality.words import CHOSEN, HOW, OF_THE_CONTROL

REASON = 160  # characters of why something is missing; missing.json has the rest
OVER_PICTURES = ("knn", "zero-shot-seen", "zero-shot-held-out", "retrieval")
HEAD = """# Results

Made by `make results` from what is stored, by the commands at the end; do not edit it by hand.

Every figure is of the val shards of the image sets, whose train shards fit the probes and chose
the constant shapes; brackets are 95 % intervals over pictures. All columns of a line see pictures
of the same size in px, squashed to a square. A cell is one file of
[{out}]({link}), with the `radio evaluate` line that measures it again, commit and versions. The
tasks are described in their modules, `radio/evaluation/`.
"""
FLOORS = """The floor is raw pixels (their values at 64 px; for maps the mean colour and the place
of each 4 x 4 px cell), a guess, or the constant shape that fits the train split's instances best,
drawn round the point or into the box. `linear` has none: raw pixels have too many channels for it.
"""
KEEPS = """(student - floor) / (best teacher's - floor) at the same size, all three weighted
together. Bold where the teacher is the best at any size. The student's output is its
backbone's, or its adaptor's where texts or masks are decoded.
"""
SCALES = {
    "rank": "the higher the more directions; of 1,000 pictures",
    "shift": "1 - cos after moving by 1 and 2 patches; lower is better",
    "scale": "1 - cos between the sizes; lower is better",
    **dict.fromkeys(
        SWITCHES,
        "min e / max e of the worst teacher; 1 is even; SAM sees small pictures on a full canvas",
    ),
    "similarity": "1 is the same arrangement of pictures",
}


def page(stored: Stored, prefix: str, out: str, link: str) -> list[str]:
    """Return the lines of the page.

    Args:
        prefix: of the teachers' names.
        out: where the JSON files lie, as it is to be read; `link` leads there from the page.
    """
    there = {record.subject for record in stored.records}
    columns = [*(f"{prefix}_{name}" for name in ADAPTORS), STUDENT]
    columns += [CONTROL] if CONTROL in there else []
    missing = {name: "not yet" for name in (PIXELS, CONSTANT, *columns) if name not in there}
    return [
        HEAD.format(out=out, link=link),
        *_missing({**missing, **stored.missing}),
        *["## Teachers and student", "", FLOORS, *_main(stored, columns)],
        *["## What else is told of them", "", *_else(stored, columns)],
        *["## What the student keeps", "", KEEPS, *_kept(stored)],
        *_curve(stored),
        *["## What they cost", "", *_costs(stored, columns)],
        *["## What they must show", "", *_verdicts(stored, prefix)],
        *["## How settings were chosen", "", CHOSEN],
        *["## How it was made", "", HOW, *_made(stored)],
    ]


def _missing(reasons: dict[str, str]) -> list[str]:
    lines = [f"- `{what}`: {shorten(why, REASON)}" for what, why in sorted(reasons.items())]
    return ["**Not measured:**", "", *lines, ""] if lines else []


def _main(stored: Stored, columns: Sequence[str]) -> list[str]:
    rows = [
        [row.title, str(size), _floor(stored, row, size), *cells]
        for row in rows_of(*COMPARED)
        for size, cells in _cells(stored, row, columns)
    ]
    return table(["task", "px", "floor", *columns], rows)


def _else(stored: Stored, columns: Sequence[str]) -> list[str]:
    rows = [
        [row.title, str(size or NONE), *cells, SCALES[row.name]]
        for row in rows_of("else")
        for size, cells in _cells(stored, row, columns)
    ]
    return table(["measure", "px", *columns, "scale"], rows)


def _floor(stored: Stored, row: Row, size: int | None) -> str:
    floor = floor_of(stored, row.name, size)
    if floor is None:
        return NONE
    return f"{'guess ' if row.of == 'text' else ''}{number(floor.score, floor.interval)}"


def _cells(
    stored: Stored, row: Row, columns: Sequence[str]
) -> Iterator[tuple[int | None, list[str]]]:
    """Yield each size of a row with its cells, a column each."""
    sizes = {record.size for record in stored.of(row.name) if record.subject in columns}
    for size in sorted(sizes, key=lambda size: size or 0):
        yield size, [_cell([r for r in stored.of(row.name, c) if r.size == size]) for c in columns]


def _cell(records: Sequence[Record]) -> str:
    """Return the scores of a column, one a line, with the adaptor that each was measured by."""
    ordered = sorted(records, key=lambda record: record.tag)
    told = [f"{r.tag} {number(r.score, r.interval)}".lstrip() for r in ordered]
    return "<br>".join(told) or NONE


def _kept(stored: Stored) -> list[str]:
    """Return the table of (student - floor) / (best teacher's - floor)."""
    rows = [
        [
            row.title,
            str(kept.size),
            number(kept.floor.score),
            f"{kept.teacher.subject} {number(kept.teacher.score)}",
            number(kept.student.score),
            _share(kept),
        ]
        for row in rows_of(*COMPARED)
        for kept in kept_of(stored, row.name)
    ]
    return table(["task", "px", "floor", "best teacher", "student", "kept"], rows)


def _share(kept: Kept) -> str:
    if kept.retention.share is None:
        return "the teacher is not above the floor"
    told = number(kept.retention.share, kept.retention.interval, 2)
    return f"**{told}**" if kept.is_best else told


def _curve(stored: Stored) -> list[str]:
    """Return what the checkpoints of a run keep over the pictures that they have seen."""
    rows = []
    for subject in stored.subjects(CURVE):
        seen = next(r.facts["views_seen"] for r in stored.records if r.subject == subject)
        cells = [_of_curve(kept_of(stored, row, subject)) for row in OVER_PICTURES]
        rows.append([subject, f"{seen:,}", *cells])
    if not rows:
        return []
    what = "Score, and the share that is kept, of the checkpoints of the student's run."
    head = ["checkpoint", "views seen", *(ROWS[row].title for row in OVER_PICTURES)]
    return ["## Over the pictures seen", "", what, "", *table(head, rows)]


def _of_curve(several: Sequence[Kept]) -> str:
    """Return what is kept of the best teacher, or of another where that one's size is not seen."""
    kept = min(several, key=lambda kept: not kept.is_best, default=None)
    return NONE if kept is None else f"{number(kept.student.score)}, kept {_share(kept)}"


def _costs(stored: Stored, columns: Sequence[str]) -> list[str]:
    costs = {subject: stored.costs[subject] for subject in columns if subject in stored.costs}
    rows = []
    for subject, cost in costs.items():
        whole = cost.get("gflop_with_adaptors", {})
        for size, gflop in cost["gflop"].items():
            figures = [number(gflop), number(whole.get(size))]
            rows.append([subject, number(cost["parameters_m"], digits=2), size, *figures])
    return [
        "GFLOP per image, 2 per multiply-add; text towers and mask decoders are not counted.",
        "",
        *table(["model", "M parameters", "px", "GFLOP", "with all adaptors"], rows),
    ]


def _verdicts(stored: Stored, prefix: str) -> list[str]:
    found = verdicts(stored, prefix)
    words = {True: "yes", False: "**no**", None: NONE}
    counts = Counter(verdict.holds for verdict in found)
    return [
        f"{counts[True]} of {len(found)} lines hold, {counts[False]} do not, {counts[None]} "
        "without an answer.",
        "",
        OF_THE_CONTROL,
        *table(
            ["", "at least", "found", "holds"],
            [[v.what, v.needed, v.found, words[v.holds]] for v in found],
        ),
    ]


def _made(stored: Stored) -> list[str]:
    facts = [record.facts for record in stored.records]
    if not facts:
        return []
    seconds = timedelta(seconds=round(sum(each["seconds"] for each in facts)))
    commits = sorted({each["commit"] for each in facts})
    versions = sorted({f"{k} {v}" for each in facts for k, v in each["versions"].items()})
    return [
        f"{len(facts)} results, {seconds} of work in all; commits {', '.join(commits)}; "
        f"{', '.join(versions)}.",
    ]
