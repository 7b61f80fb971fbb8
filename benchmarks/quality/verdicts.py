"""What the results must show, line by line, and whether they do."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass

from benchmarks.markdown import number
from benchmarks.quality.compare import AT, COMPARED, difference, kept_of
from benchmarks.quality.jobs import (
    CONSTANT,
    CONTROL,
    PIXELS,
    ROWS,
    STUDENT,
    SWITCHES,
    TEXT,
    rows_of,
)
from benchmarks.quality.store import Record, Stored
from radio.evaluation.result import Interval
from radio.evaluation.retrieval import DIRECTIONS
from teachers.weights import shipped

RECALL, SEEN, HELD_OUT = 0.30, 0.55, 0.15
OVER_PLACE = 0.15  # mIoU above colour and position
OVER_PIXELS = {"scratch": 2.5, "the trunk": 4.0}  # times the kNN of pixels, by where it starts
OVER_CONSTANT = {"point": 0.10, "box": 0.03}
KEPT = {"map": 0.7, "masks": 0.7, "summary": 0.5, "text": 0.5}
EVEN, EXPLAINED = 0.7, 0.1  # of a mode switch: min e / max e, and max e


@dataclass(frozen=True)
class Verdict:
    """A floor, what was found, and whether it holds; None where that has no answer."""

    what: str
    needed: str
    found: str = "not measured"
    holds: bool | None = None


def verdicts(stored: Stored, prefix: str) -> list[Verdict]:
    """Return every line in order."""
    return [
        *_text(stored, prefix),
        *_dinov2(stored, f"{prefix}_dinov2"),
        *_sam(stored, f"{prefix}_sam"),
        *_student(stored),
        *_control(stored),
        *_mode_switch(stored),
    ]


def _at_least(what: str, least: float, score: float | None, interval: Interval | None) -> Verdict:
    if score is None:
        return Verdict(what, f"{least:.2f}")
    return Verdict(what, f"{least:.2f}", number(score, interval), score >= least)


def _text(stored: Stored, prefix: str) -> Iterator[Verdict]:
    for teacher in (f"{prefix}_{name}" for name in TEXT):
        for row, least in (("zero-shot-seen", SEEN), ("zero-shot-held-out", HELD_OUT)):
            record = stored.one(row, teacher)
            found = (record.score, record.interval) if record else (None, None)
            yield _at_least(f"{teacher}: {ROWS[row].title}, top 1", least, *found)
        record = stored.one("retrieval", teacher)
        rows = [row for row in record.details["rows"] if row["k"] == AT] if record else []
        at = {row["direction"]: (row["recall"], row["interval"]) for row in rows}
        for direction in DIRECTIONS:
            what = f"{teacher}: Flickr8k recall@{AT}, {direction.replace('_', ' ')}"
            yield _at_least(what, RECALL, *at.get(direction, (None, None)))


def _dinov2(stored: Stored, teacher: str) -> Iterator[Verdict]:
    what = f"{teacher}: CamVid above colour + position"
    records = sorted(stored.of("camvid", teacher), key=lambda record: record.size or 0)
    for record in records:
        floor = stored.one("camvid", PIXELS, record.size)
        yield _gain(f"{what}, {record.size} px", OVER_PLACE, record, floor)
    if not records:
        yield _gain(what, OVER_PLACE, None, None)
    knn, floor = stored.one("knn", teacher), stored.one("knn", PIXELS)
    start = start_of(teacher)
    times = OVER_PIXELS[start]
    line = f"{teacher}: kNN over pixels', from {start}", f"{times:g} x"
    if knn is None or floor is None:
        yield Verdict(*line)
    else:
        found = f"{knn.score / floor.score:.1f} x ({number(knn.score)})"
        yield Verdict(*line, found, knn.score >= times * floor.score)


def start_of(teacher: str) -> str:
    """Return what a DINOv2 starts from as its training.json says; "scratch" if it has none."""
    weights = shipped().get(teacher)
    if weights is None:
        return "scratch"
    parts = json.loads((weights.parent / "training.json").read_text())["cpu_minutes"]
    return "the trunk" if "trunk" in parts else "scratch"


def _sam(stored: Stored, teacher: str) -> Iterator[Verdict]:
    for row in rows_of("masks"):
        what = f"{teacher}: {row.title}, over the best constant"
        least = OVER_CONSTANT[row.options["prompt"]]
        record, floor = stored.one(row.name, teacher), stored.one(row.name, CONSTANT)
        yield _gain(what, least, record, floor, surely=True)


def _gain(
    what: str, least: float, record: Record | None, floor: Record | None, surely: bool = False
) -> Verdict:
    """Return the line of a lead over a floor; `surely` if its paired interval is above 0 too."""
    if record is None or floor is None:
        return Verdict(what, f"+{least:.2f}")
    gain, interval = difference(record, floor)
    above = interval is not None and interval[0] > 0
    found = number(gain, interval, sign="+")
    return Verdict(what, f"+{least:.2f}", found, gain >= least and (above or not surely))


def _student(stored: Stored) -> Iterator[Verdict]:
    for row in rows_of(*COMPARED):
        if row.name == "linear":
            continue
        least = KEPT[row.of]
        line = f"student keeps of {row.title}", f"{least:g}"
        kept = next((one for one in kept_of(stored, row.name) if one.is_best), None)
        if kept is None:
            yield Verdict(*line)
        elif kept.retention.share is None:
            yield Verdict(*line, "the best teacher is not above the floor")
        else:
            found = number(kept.retention.share, kept.retention.interval)
            by = f"{found} of {kept.teacher.subject}'s at {kept.size} px"
            have_values = all(r.samples is not None for r in (kept.student, kept.teacher))
            if have_values and kept.retention.interval is None:
                yield Verdict(*line, f"{by}, whose lead over the floor is not resolved")
            else:
                yield Verdict(*line, by, kept.retention.share >= least)


def _control(stored: Stored) -> Iterator[Verdict]:
    """Yield whether the control's interval is below the student's, row by row, worst size first."""
    for row in rows_of(*COMPARED):
        line = f"random teachers' student below ours: {row.title}", "interval below"
        pairs = [
            (record, ours)
            for record in stored.of(row.name, CONTROL)
            if (ours := stored.one(row.name, STUDENT, record.size, record.tag)) is not None
        ]
        if not pairs:
            yield Verdict(*line)
            continue
        record, ours = min(pairs, key=lambda pair: _room(*pair))
        scores = [number(each.score, each.interval) for each in (record, ours)]
        paired = number(*difference(ours, record), sign="+")
        found = f"{' against '.join(scores)}; paired {paired}"
        yield Verdict(*line, found, _room(record, ours) > 0)


def _room(control: Record, ours: Record) -> float:
    """Return how far the student's lower end lies above the control's upper end."""
    assert control.interval is not None and ours.interval is not None, "these tasks have intervals"
    return ours.interval[0] - control.interval[1]


def _mode_switch(stored: Stored) -> Iterator[Verdict]:
    needed = f"min e / max e {EVEN}, max e {EXPLAINED}"
    for row in SWITCHES:
        what = f"student's {ROWS[row].title}"
        record = stored.one(row, STUDENT)
        if record is None:
            yield Verdict(what, needed)
            continue
        for teacher, said in record.details["teachers"].items():
            ratio, most = said["min_over_max"], said["max"]
            found = f"{number(ratio, said['interval'])}, max e {most:.3f}"
            yield Verdict(f"{what}: {teacher}", needed, found, ratio >= EVEN and most >= EXPLAINED)
