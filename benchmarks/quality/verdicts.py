"""What the results must show, line by line, and whether they do."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from benchmarks.quality.compare import (
    COMPARED,
    difference,
    floor_of,
    kept_of,
)
from benchmarks.quality.jobs import CONTROL, PIXELS, ROWS, STUDENT, TEXT
from benchmarks.quality.store import Record, Stored
from radio.evaluation.result import Interval

RECALL, SEEN, HELD_OUT = 0.30, 0.55, 0.15
OVER_PLACE = 0.15  # mIoU above colour and position
FROM_SCRATCH, FROM_TRUNK = 2.5, 4.0  # times the kNN of pixels
OVER_CONSTANT = {"point": 0.10, "box": 0.03}
KEPT = {"map": 0.7, "masks": 0.7, "summary": 0.5, "text": 0.5}
EVEN, EXPLAINED = 0.7, 0.1  # of a mode switch: min e / max e, and max e


@dataclass(frozen=True)
class Verdict:
    """A floor, what was found, and whether it holds; None where it is not measured."""

    what: str
    needed: str
    found: str
    holds: bool | None


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


def _at_least(what: str, least: float, record: Record | None) -> Verdict:
    if record is None:
        return Verdict(what, f"{least:.2f}", "not measured", None)
    return Verdict(
        what, f"{least:.2f}", number(record.score, record.interval), record.score >= least
    )


def _text(stored: Stored, prefix: str) -> Iterator[Verdict]:
    for name in TEXT:
        teacher = f"{prefix}_{name}"
        for row, least in (("zero-shot-seen", SEEN), ("zero-shot-held-out", HELD_OUT)):
            yield _at_least(f"{teacher}: {ROWS[row].title}, top 1", least, stored.one(row, teacher))
        record = stored.one("retrieval", teacher)
        for direction in ("image_to_text", "text_to_image"):
            what = f"{teacher}: Flickr8k recall@5, {direction.replace('_', ' ')}"
            if record is None:
                yield Verdict(what, f"{RECALL:.2f}", "not measured", None)
                continue
            rows: list[dict[str, Any]] = record.details["rows"]
            at = next(r for r in rows if r["direction"] == direction and r["k"] == 5)
            found = number(at["recall"], tuple(at["interval"]))
            yield Verdict(what, f"{RECALL:.2f}", found, at["recall"] >= RECALL)


def _dinov2(stored: Stored, teacher: str) -> Iterator[Verdict]:
    for record in sorted(stored.of("camvid", teacher), key=lambda r: r.size or 0):
        floor = stored.one("camvid", PIXELS, record.size)
        what = f"{teacher}: CamVid above colour + position, {record.size} px"
        yield _gain(what, OVER_PLACE, record, floor)
    if not list(stored.of("camvid", teacher)):
        yield Verdict(
            f"{teacher}: CamVid above colour + position", f"+{OVER_PLACE}", "not measured", None
        )
    knn, floor = stored.one("knn", teacher), stored.one("knn", PIXELS)
    for times, start in ((FROM_SCRATCH, "scratch"), (FROM_TRUNK, "the trunk")):
        what, needed = f"{teacher}: kNN over pixels', if from {start}", f"{times:g} x"
        if knn is None or floor is None:
            yield Verdict(what, needed, "not measured", None)
        else:
            found = knn.score / floor.score
            yield Verdict(
                what, needed, f"{found:.1f} x ({knn.score:.3f})", knn.score >= times * floor.score
            )


def _sam(stored: Stored, teacher: str) -> Iterator[Verdict]:
    for data in ("coco", "people"):
        for prompt, least in OVER_CONSTANT.items():
            row = f"masks-{prompt}-{data}"
            what = f"{teacher}: {ROWS[row].title}, over the best constant"
            record = stored.one(row, teacher)
            constant = None if record is None else floor_of(stored, record)
            floor = None if constant is None else stored.one(row, constant[1])
            yield _gain(what, least, record, floor, surely=True)


def _gain(
    what: str,
    least: float,
    record: Record | None,
    floor: Record | None,
    surely: bool = False,
) -> Verdict:
    """Return the line of a lead over a floor; `surely` if its paired interval is above 0 too."""
    if record is None or floor is None:
        return Verdict(what, f"+{least:.2f}", "not measured", None)
    gain, interval = difference(record, floor)
    above = interval is not None and interval[0] > 0
    found = f"{gain:+.3f}{_bracket(interval)}"
    return Verdict(what, f"+{least:.2f}", found, gain >= least and (above or not surely))


def _student(stored: Stored) -> Iterator[Verdict]:
    for row in ROWS.values():
        if row.of not in KEPT or row.name == "linear":
            continue
        least = KEPT[row.of]
        what = f"student keeps of {row.title}"
        kept = next((one for one in kept_of(stored, row.name) if one.is_best), None)
        if kept is None or kept.retention.share is None:
            why = "not measured" if kept is None else "the best teacher is not above the floor"
            yield Verdict(what, f"{least:g}", why, None)
            continue
        found = number(kept.retention.share, kept.retention.interval)
        by = f"{found} of {kept.teacher.subject}'s at {kept.size} px"
        yield Verdict(what, f"{least:g}", by, kept.retention.share >= least)


def _control(stored: Stored) -> Iterator[Verdict]:
    """Yield whether the control's interval is below the student's, row by row, worst size first."""
    for row in ROWS.values():
        if row.of not in COMPARED:
            continue
        pairs = [
            (record, other)
            for record in stored.of(row.name, CONTROL)
            if (other := stored.one(row.name, STUDENT, record.size, record.tag)) is not None
        ]
        what = f"random teachers' student below ours: {row.title}"
        if not pairs:
            yield Verdict(what, "interval below", "not measured", None)
            continue
        record, ours = min(pairs, key=lambda pair: _room(*pair))
        found = (
            f"{number(record.score, record.interval)} against {number(ours.score, ours.interval)}"
        )
        paired = difference(ours, record)
        found += f"; paired {paired[0]:+.3f}{_bracket(paired[1])}"
        yield Verdict(what, "interval below", found, _room(record, ours) > 0)


def _room(control: Record, ours: Record) -> float:
    """Return how far the student's lower end lies above the control's upper end."""
    assert control.interval is not None and ours.interval is not None, "these tasks have intervals"
    return ours.interval[0] - control.interval[1]


def _mode_switch(stored: Stored) -> Iterator[Verdict]:
    what, needed = "mode switch of the student", f"min e / max e {EVEN}, max e {EXPLAINED}"
    record = stored.one("mode-switch", STUDENT)
    if record is None:
        yield Verdict(what, needed, "not measured", None)
        return
    for teacher, found in record.details["teachers"].items():
        ratio, most = found["min_over_max"], found["max"]
        yield Verdict(
            f"{what}: {teacher}",
            needed,
            f"{number(ratio, tuple(found['interval']))}, max e {most:.2f}",
            ratio >= EVEN and most >= EXPLAINED,
        )


def number(value: float, interval: Interval | None = None, digits: int = 3) -> str:
    """Return `0.534 [0.503, 0.565]`."""
    return f"{value:.{digits}f}{_bracket(interval, digits)}"


def _bracket(interval: Interval | None, digits: int = 3) -> str:
    return "" if interval is None else f" [{interval[0]:.{digits}f}, {interval[1]:.{digits}f}]"
