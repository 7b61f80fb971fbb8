"""What of a teacher's lead over the floor the student keeps, and other comparisons of results."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.quality.jobs import CONSTANT, PIXELS, ROWS, STUDENT, TEACHER, adaptor_to
from benchmarks.quality.store import Record, Stored
from radio.errors import RadioError
from radio.evaluation.masks import ratio
from radio.evaluation.result import (
    Interval,
    Statistic,
    bootstrap,
    mean,
    paired_bootstrap,
    weighted,
)
from radio.evaluation.retrieval import TOP, mean_recall
from radio.evaluation.segmentation import mean_iou

AT = 5  # of retrieval
COMPARED = ("summary", "text", "map", "masks")  # rows where more is better and a floor is known
STATISTICS = {"segmentation": mean_iou, "masks": ratio, "retrieval": mean_recall}


@dataclass(frozen=True)
class Side:
    """A score, the values per picture that a statistic makes it from (none of a guess), and whose.

    `interval` is the score's own.
    """

    score: float
    values: NDArray[Any] | None = None
    interval: Interval | None = None
    name: str = "guess"

    @classmethod
    def of(cls, record: Record) -> Side:
        """Return a result as one side of a comparison, as `statistic_of` its row takes it."""
        values = record.samples
        if values is not None and ROWS[record.row].task == "retrieval":
            values = values[:, :, [TOP.index(AT), -1]]
        return cls(record.score, values, record.interval, record.subject)


@dataclass(frozen=True)
class Retention:
    """(student - floor) / (teacher - floor) with its 95 % interval over pictures."""

    share: float | None
    interval: Interval | None


@dataclass(frozen=True)
class Kept:
    """The student beside the best teacher of a row and size."""

    size: int | None
    floor: Side
    teacher: Record
    student: Record
    retention: Retention
    is_best: bool  # no teacher is better at any size


def statistic_of(row: str) -> Statistic:
    """Return what makes a row's score from the values of its pictures."""
    return STATISTICS.get(ROWS[row].task, mean)


def retention(student: Side, teacher: Side, floor: Side, statistic: Statistic) -> Retention:
    """Return what is kept; no share where the teacher is not above the floor.

    The interval weighs pictures, the same way for all three; a floor without values stays what it
    is. None where a resample's teacher is not above the floor, or values are lacking.

    Raises:
        RadioError: the three are about different numbers of pictures.
    """
    lead = teacher.score - floor.score
    if lead <= 0:
        return Retention(None, None)
    share = (student.score - floor.score) / lead
    if student.values is None or teacher.values is None:
        return Retention(share, None)
    given = [side.values for side in (student, teacher, floor) if side.values is not None]
    if len({len(values) for values in given}) > 1:
        counts = ", ".join(str(len(values)) for values in given)
        raise RadioError(f"results of {counts} pictures are compared; measure them on the same")

    def kept(weights: NDArray[np.float64]) -> float:
        scores = [statistic(weighted(values, weights)) for values in given]
        low = scores[2] if len(scores) > 2 else floor.score
        return (scores[0] - low) / (scores[1] - low) if scores[1] > low else math.nan

    interval = bootstrap(np.ones(len(given[0])), kept)
    return Retention(share, None if math.isnan(interval[0]) else interval)


def floor_of(stored: Stored, row: str, size: int | None) -> Side | None:
    """Return the floor of a row at a size; None where it is not measured."""
    of = ROWS[row].of
    if of == "text":
        known = next(stored.of(row), None)
        return None if known is None else Side(chance_of(known))
    floor = stored.one(row, CONSTANT if of == "masks" else PIXELS, size if of == "map" else None)
    return None if floor is None else Side.of(floor)


def chance_of(record: Record) -> float:
    """Return the score of a guess: 1 / classes, or the mean recall of a random order."""
    if ROWS[record.row].task == "zero-shot":
        return float(record.details["chance"])
    pictures, captions = record.details["pictures"], record.details["captions"]
    each = captions / pictures
    missed: float = math.prod((captions - each - k) / (captions - k) for k in range(AT))
    return float(1 - missed + AT / pictures) / 2


def kept_of(stored: Stored, row: str, subject: str = STUDENT) -> list[Kept]:
    """Return, at each size, what the student keeps of the best teacher's lead at that size.

    Through its adaptor to that teacher where texts or masks are decoded, and the backbone's own
    output elsewhere.
    """
    best: dict[int | None, Record] = {}
    for record in stored.of(row):
        at = best.get(record.size)
        if record.facts["role"] == TEACHER and (at is None or record.score > at.score):
            best[record.size] = record
    most = max((record.score for record in best.values()), default=0.0)
    found = []
    for size, teacher in sorted(best.items(), key=lambda item: item[0] or 0):
        tag = adaptor_to(teacher.subject) if ROWS[row].of in ("text", "masks") else ""
        student, floor = stored.one(row, subject, size, tag), floor_of(stored, row, size)
        if student is not None and floor is not None:
            share = retention(Side.of(student), Side.of(teacher), floor, statistic_of(row))
            found.append(Kept(size, floor, teacher, student, share, teacher.score == most))
    return found


def difference(first: Record, second: Record) -> tuple[float, Interval | None]:
    """Return first - second with its paired 95 % interval, where both have values."""
    a, b = Side.of(first).values, Side.of(second).values
    if a is None or b is None:
        return first.score - second.score, None
    return first.score - second.score, paired_bootstrap(a, b, statistic_of(first.row))
