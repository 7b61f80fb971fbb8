"""docs/results.md, made from what is stored."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import timedelta
from textwrap import shorten

from benchmarks.quality.compare import COMPARED, Kept, chance_of, curve_of, kept_of
from benchmarks.quality.jobs import ADAPTORS, CONSTANT, CONTROL, PIXELS, ROWS, STUDENT, Row
from benchmarks.quality.store import Record, Stored
from benchmarks.quality.verdicts import Verdict, number, verdicts

NONE = "–"
REASON = 160  # characters of why something is missing; missing.json has the rest
CURVE = ("knn", "zero-shot-seen", "zero-shot-held-out", "retrieval")
HEAD = """# Results

<!-- made by `make results`; do not edit -->

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
SCALES = {
    "rank": "the higher the more directions; of 1,000 pictures",
    "shift": "1 - cos after moving by 1 and 2 patches; lower is better",
    "scale": "1 - cos between the sizes; lower is better",
    "mode-switch": "the worst teacher; 1 is even",
    "similarity": "1 is the same arrangement of pictures",
}


def page(stored: Stored, prefix: str, out: str, link: str) -> str:
    """Return the whole page.

    Args:
        prefix: of the teachers' names.
        out: where the JSON files lie, as it is to be read; `link` leads there from the page.
    """
    columns = [*(f"{prefix}_{name}" for name in ADAPTORS), STUDENT]
    columns += [CONTROL] if list(_all_of(stored, CONTROL)) else []
    parts = [
        [HEAD.format(out=out, link=link)],
        _missing(stored, columns),
        _main(stored, columns),
        _kept(stored),
        _curve(stored),
        _costs(stored, columns),
        _verdicts(verdicts(stored, prefix)),
        _made(stored),
    ]
    return "\n".join(line for part in parts for line in part).rstrip() + "\n"


def _all_of(stored: Stored, subject: str) -> Iterator[Record]:
    return (record for record in stored.records if record.subject == subject)


def _missing(stored: Stored, columns: Sequence[str]) -> list[str]:
    reasons = dict(stored.missing)
    for subject in (PIXELS, CONSTANT, *columns):
        if not list(_all_of(stored, subject)):
            reasons.setdefault(subject, "not yet")
    if not reasons:
        return []
    return [
        "**Not measured:**",
        "",
        *(f"- `{what}`: {shorten(why, REASON)}" for what, why in sorted(reasons.items())),
        "",
    ]


def _main(stored: Stored, columns: Sequence[str]) -> list[str]:
    lines = ["## Teachers and student", "", FLOORS]
    compared = [row for row in ROWS.values() if row.of in COMPARED]
    lines += _table(
        ["task", "px", "floor", *columns],
        [
            [row.title, str(size), _floor(stored, row, size), *_cells(stored, row, size, columns)]
            for row in compared
            for size in _sizes(stored, row, columns)
        ],
    )
    lines += ["## What else is told of them", ""]
    lines += _table(
        ["measure", "px", *columns, "scale"],
        [
            [
                row.title,
                NONE if size is None else str(size),
                *_cells(stored, row, size, columns),
                SCALES[row.name],
            ]
            for row in ROWS.values()
            if row.of == "else"
            for size in _sizes(stored, row, columns)
        ],
    )
    return lines


def _sizes(stored: Stored, row: Row, columns: Sequence[str]) -> list[int | None]:
    found = {record.size for record in stored.of(row.name) if record.subject in columns}
    return sorted(found, key=lambda size: size or 0)


def _cells(stored: Stored, row: Row, size: int | None, columns: Sequence[str]) -> list[str]:
    return [_cell([r for r in stored.of(row.name, c) if r.size == size]) for c in columns]


def _cell(records: Sequence[Record]) -> str:
    """Return the scores of a column, one a line, with the adaptor that each was measured by."""
    ordered = sorted(records, key=lambda record: record.tag)
    told = [f"{r.tag + ' ' if r.tag else ''}{number(r.score, r.interval)}" for r in ordered]
    return "<br>".join(told) or NONE


def _floor(stored: Stored, row: Row, size: int | None) -> str:
    if row.of == "text":
        record = next((r for r in stored.of(row.name) if r.size == size), None)
        return NONE if record is None else f"guess {chance_of(record):.3f}"
    subject = CONSTANT if row.of == "masks" else PIXELS
    record = stored.one(row.name, subject, size if row.of == "map" else None)
    return NONE if record is None else _cell([record])


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
        for row in ROWS.values()
        if row.of in COMPARED
        for kept in kept_of(stored, row.name)
    ]
    return [
        "## What the student keeps",
        "",
        "(student - floor) / (best teacher's - floor) at the same size, all three resampled",
        "together. Bold where the teacher is the best at any size. The student's output is its",
        "backbone's, or its adaptor's where texts or masks are decoded.",
        "",
        *_table(["task", "px", "floor", "best teacher", "student", "kept"], rows),
    ]


def _share(kept: Kept) -> str:
    if kept.retention.share is None:
        return "the teacher is not above the floor"
    told = number(kept.retention.share, kept.retention.interval, 2)
    return f"**{told}**" if kept.is_best else told


def _curve(stored: Stored) -> list[str]:
    """Return what the checkpoints of a run keep over the pictures that they have seen."""
    subjects = stored.subjects("curve")
    if not subjects:
        return []
    by_row = {row: {k.student.subject: k for k in curve_of(stored, subjects, row)} for row in CURVE}
    rows = [
        [
            subject,
            f"{next(_all_of(stored, subject)).facts['views_seen']:,}",
            *(_of_curve(by_row[row].get(subject)) for row in CURVE),
        ]
        for subject in subjects
    ]
    titles = [ROWS[row].title for row in CURVE]
    return [
        "## Over the pictures seen",
        "",
        "Score, and the share that is kept, of the checkpoints of the student's run.",
        "",
        *_table(["checkpoint", "views seen", *titles], rows),
    ]


def _of_curve(kept: Kept | None) -> str:
    return NONE if kept is None else f"{number(kept.student.score)}, kept {_share(kept)}"


def _costs(stored: Stored, columns: Sequence[str]) -> list[str]:
    rows = []
    for subject in columns:
        cost = stored.costs.get(subject)
        if cost is None:
            continue
        for size, gflop in cost["gflop"].items():
            whole = cost.get("gflop_with_adaptors", {}).get(size)
            rows.append(
                [
                    subject,
                    f"{cost['parameters_m']:.2f}",
                    size,
                    f"{gflop:.3f}",
                    NONE if whole is None else f"{whole:.3f}",
                ]
            )
    return [
        "## What they cost",
        "",
        "GFLOP per image, 2 per multiply-add; text towers and mask decoders are not counted.",
        "",
        *_table(["model", "M parameters", "px", "GFLOP", "with all adaptors"], rows),
    ]


def _verdicts(found: Sequence[Verdict]) -> list[str]:
    words = {True: "yes", False: "**no**", None: NONE}
    held = sum(verdict.holds is True for verdict in found)
    failed = sum(verdict.holds is False for verdict in found)
    rows = [[v.what, v.needed, v.found, words[v.holds]] for v in found]
    return [
        "## What they must show",
        "",
        f"{held} of {len(found)} lines hold, {failed} do not, {len(found) - held - failed} are not "
        "measured.",
        "",
        *_table(["", "at least", "found", "holds"], rows),
    ]


def _made(stored: Stored) -> list[str]:
    if not stored.records:
        return []
    seconds = sum(record.facts["seconds"] for record in stored.records)
    commits = sorted({record.facts["commit"] for record in stored.records})
    versions = sorted(
        {f"{k} {v}" for record in stored.records for k, v in record.facts["versions"].items()}
    )
    return [
        "## How it was made",
        "",
        f"{len(stored.records)} results, {timedelta(seconds=round(seconds))} of work in all; "
        f"commits {', '.join(commits)}; {', '.join(versions)}.",
    ]


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    if not rows:
        return ["Nothing yet.", ""]
    lines = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    return [*lines, *(f"| {' | '.join(row)} |" for row in rows), ""]
