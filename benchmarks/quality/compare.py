"""What of a teacher's lead over the floor the student keeps, and other comparisons of results."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.quality.jobs import CONSTANT, PIXELS, ROWS, STUDENT
from benchmarks.quality.store import Record, Stored
from radio.errors import RadioError
from radio.evaluation.masks import ratio
from radio.evaluation.result import Interval, Statistic, bootstrap, mean, paired_bootstrap
from radio.evaluation.retrieval import TOP, mean_recall

AT = 5  # of retrieval
COMPARED = ("summary", "text", "map", "masks")  # rows where more is better and a floor is known


@dataclass(frozen=True)
class Side:
    """A score, and the values per picture that a statistic makes it from; none of a chance."""

    score: float
    values: NDArray[Any] | None = None


@dataclass(frozen=True)
class Retention:
    """(student - floor) / (teacher - floor) with its 95 % interval over resampled pictures."""

    share: float | None
    interval: Interval | None


@dataclass(frozen=True)
class Kept:
    """The student beside the best teacher of a row and size."""

    row: str
    size: int | None
    floor: Side
    floor_name: str
    teacher: Record
    student: Record
    retention: Retention
    is_best: bool  # no teacher is better at any size


def statistic_of(row: str) -> Statistic:
    """Return what makes a row's score from the values that `values_of` gives."""
    task = ROWS[row].task
    by_task = {"segmentation": iou_of_counts, "masks": ratio, "retrieval": mean_recall}
    return by_task.get(task, mean)


def values_of(record: Record) -> NDArray[Any] | None:
    """Return a result's values per picture as its statistic takes them, rows aligned."""
    samples = record.samples
    task = ROWS[record.row].task
    if samples is None:
        return None
    if task == "segmentation":
        return counts_of(samples)
    if task == "retrieval":
        return samples[:, :, [TOP.index(AT), -1]]
    return samples


def counts_of(confusions: NDArray[Any]) -> NDArray[np.int64]:
    """Return right, labelled and predicted pixels [N, 3, classes] of [N, labelled, predicted]."""
    right = np.diagonal(confusions, axis1=1, axis2=2)
    return np.stack([right, confusions.sum(axis=2), confusions.sum(axis=1)], 1).astype(np.int64)


def iou_of_counts(counts: NDArray[Any]) -> float:
    """Return mIoU over the classes that are labelled, as radio.evaluation.segmentation does."""
    right, labelled, predicted = counts.sum(axis=0)
    present = labelled > 0
    union = (labelled + predicted - right)[present]
    return float((right[present] / union).mean()) if present.any() else 0.0


def side(record: Record) -> Side:
    """Return a result as one side of a comparison."""
    return Side(record.score, values_of(record))


def retention(student: Side, teacher: Side, floor: Side, statistic: Statistic) -> Retention:
    """Return what is kept; no share where the teacher is not above the floor.

    The interval resamples pictures, the same for all three; a floor without values stays what it
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

    def kept(rows: NDArray[Any]) -> float:
        scores = [statistic(values[rows]) for values in given]
        low = scores[2] if len(scores) > 2 else floor.score
        return (scores[0] - low) / (scores[1] - low) if scores[1] > low else math.nan

    interval = bootstrap(np.arange(len(given[0])), kept)
    return Retention(share, None if math.isnan(interval[0]) else interval)


def floor_of(stored: Stored, teacher: Record) -> tuple[Side, str] | None:
    """Return the floor of a teacher's row and what it is; None where it is not measured."""
    row = ROWS[teacher.row]
    if row.of == "text":
        score = chance_of(teacher)
        return Side(score), "chance"
    subject, size = (CONSTANT, None) if row.of == "masks" else (PIXELS, teacher.size)
    found = stored.one(row.name, subject, size if row.of == "map" else None)
    return None if found is None else (side(found), subject)


def chance_of(record: Record) -> float:
    """Return the score of a guess: 1 / classes, or the mean recall of a random order."""
    if ROWS[record.row].task == "zero-shot":
        return float(record.details["chance"])
    pictures, captions = record.details["pictures"], record.details["captions"]
    each = captions / pictures
    missed: float = math.prod((captions - each - k) / (captions - k) for k in range(AT))
    return float(1 - missed + AT / pictures) / 2


def student_beside(stored: Stored, teacher: Record, subject: str = STUDENT) -> Record | None:
    """Return the student's result of a teacher's row and size; None where there is none.

    Through its adaptor to that teacher where texts or masks are decoded, and the backbone's own
    output elsewhere.
    """
    with_adaptor = ROWS[teacher.row].of in ("text", "masks")
    tag = teacher.subject.rpartition("_")[2] if with_adaptor else ""
    return stored.one(teacher.row, subject, teacher.size, tag)


def kept_of(stored: Stored, row: str, subject: str = STUDENT) -> list[Kept]:
    """Return, at each size, what the student keeps of the best teacher's lead at that size."""
    teachers = [r for r in stored.of(row) if r.facts["role"] == "teacher"]
    if not teachers:
        return []
    best = max(teachers, key=_score)
    found = []
    for size in sorted({r.size for r in teachers}, key=lambda s: s or 0):
        teacher = max((r for r in teachers if r.size == size), key=_score)
        student, floor = student_beside(stored, teacher, subject), floor_of(stored, teacher)
        if student is None or floor is None:
            continue
        share = retention(side(student), side(teacher), floor[0], statistic_of(row))
        found.append(Kept(row, size, *floor, teacher, student, share, teacher is best))
    return found


def _score(record: Record) -> float:
    return record.score


def difference(first: Record, second: Record) -> tuple[float, Interval | None]:
    """Return first - second with its paired 95 % interval, where both have values."""
    a, b = values_of(first), values_of(second)
    interval = None
    if a is not None and b is not None:
        interval = paired_bootstrap(a, b, statistic_of(first.row))
    return first.score - second.score, interval


def curve_of(stored: Stored, subjects: Sequence[str], row: str) -> list[Kept]:
    """Return for each checkpoint what it keeps of the best teacher's lead."""
    found = []
    for subject in subjects:
        kept = kept_of(stored, row, subject)
        found += [one for one in kept if one.is_best] or kept[:1]
    return found
