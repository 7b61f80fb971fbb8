"""Held-out fidelity, how much of a teacher's features the student explains; the training line."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from radio.targets.grid import to_grid
from radio.targets.stream import PartitionBatch, StepBatch
from student.model import Student, StudentOutput


class Fidelity:
    """Sums of each view, float64, for sum (y - mean y)^2 / sum (p - y)^2 of predictions p.

    The mean is per channel, over all views and valid positions; 1 means that the student does no
    better than predicting it (PHI-S, 2410.01680).
    """

    def __init__(self) -> None:
        self.counts: list[Tensor] = []
        self.sums: list[Tensor] = []
        self.squares: list[Tensor] = []
        self.residuals: list[Tensor] = []

    def update(
        self,
        predicted: Float[Tensor, "b c h w"],
        target: Float[Tensor, "b c h w"],
        valid: Bool[Tensor, "b h w"] | None = None,
    ) -> None:
        """Add some views, of which the valid positions count; all if not given."""
        y = target.double().flatten(2)
        error = predicted.double().flatten(2) - y
        known = torch.ones(len(y), y.shape[2], dtype=torch.bool)
        if valid is not None:
            known = valid.flatten(1)
            y, error = (values.masked_fill(~known[:, None], 0) for values in (y, error))
        self.counts.append(known.sum(dim=1).double())
        self.sums.append(y.sum(dim=2))
        self.squares.append(y.square().sum(dim=(1, 2)))
        self.residuals.append(error.square().sum(dim=(1, 2)))

    def by_view(self) -> Float[Tensor, "views 2"]:
        """Return sum (y - mean y)^2 and sum (p - y)^2 of each view."""
        counts, sums = torch.cat(self.counts), torch.cat(self.sums)
        mean = sums.sum(dim=0) / counts.sum()
        spread = torch.cat(self.squares) - 2 * sums @ mean + counts * mean.square().sum()
        return torch.stack([spread, torch.cat(self.residuals)], dim=1)

    @property
    def value(self) -> float:
        """The ratio; larger is better, infinite for a prediction without error."""
        spread, residual = self.by_view().sum(dim=0).tolist()
        return float(spread / residual) if residual else math.inf


@dataclass
class Score:
    """What a student says of a teacher at a size: of features, and each summary's cosine."""

    features: Fidelity = field(default_factory=Fidelity)
    cosines: list[Tensor] = field(default_factory=list)


Scores = dict[tuple[str, int, bool], Score]  # by teacher, px a side, with merged tokens


@dataclass(frozen=True)
class Row:
    """One line of the table: a teacher at a student resolution, with or without token merging.

    `cosine` is the summary's mean cosine, None where the teacher is matched on features alone.
    """

    teacher: str
    image_size: int
    merged: bool
    fidelity: float
    cosine: float | None

    def as_dict(self) -> dict[str, Any]:
        """Return the row for JSON."""
        return asdict(self)


def held_out_rows(
    student: Student, batches: Iterable[StepBatch], device: torch.device
) -> list[Row]:
    """Measure a student as `held_out` does, and return the table."""
    return table(held_out(student, batches, device))


@torch.inference_mode()
def held_out(student: Student, batches: Iterable[StepBatch], device: torch.device) -> Scores:
    """Measure a student on held-out batches, once plain and once merged where a partition merges.

    Batches hold one partition each (`Plan.held_out`); targets should travel as float32.
    """
    scores: Scores = {}
    with _at_rest(student):
        for batch in batches:
            for partition in batch.partitions:
                for merge in sorted({0, partition.merge_per_block}):
                    outputs = student(partition.images.to(device), merge, partition.window)
                    _add(scores, partition, outputs, merge > 0)
    return scores


def table(scores: Scores) -> list[Row]:
    """Return a row for each score."""
    return [
        Row(
            *key,
            score.features.value,
            float(torch.cat(score.cosines).mean()) if score.cosines else None,
        )
        for key, score in scores.items()
    ]


@contextmanager
def _at_rest(student: Student) -> Iterator[None]:
    """Put a student in eval and without gradients, and back.

    A weight that wants none takes another kernel, also in inference mode: without this the low
    bits would depend on where the student came from.
    """
    was_training = student.training
    wanted = [parameter.requires_grad for parameter in student.parameters()]
    student.eval().requires_grad_(False)
    try:
        yield
    finally:
        student.train(was_training)
        for parameter, want in zip(student.parameters(), wanted, strict=True):
            parameter.requires_grad_(want)


def _add(
    scores: Scores, partition: PartitionBatch, outputs: dict[str, StudentOutput], merged: bool
) -> None:
    size = partition.images.shape[-1]
    for name, target in partition.targets.items():
        score = scores.setdefault((name, size, merged), Score())
        output = outputs[name]
        grid = (target.features.shape[-2], target.features.shape[-1])
        predicted = to_grid(output.features.float().cpu(), grid)
        score.features.update(predicted, target.features, target.valid)
        if output.summary is not None and target.summary is not None:
            score.cosines.append(F.cosine_similarity(output.summary.float().cpu(), target.summary))


def describe(
    losses: Mapping[str, float], images_per_second: float, wait_share: float, rows: Sequence[Row]
) -> str:
    """Return the training line: loss per teacher, rate, share of waiting, last held-out fidelity.

    A teacher's loss is the sum of its summary's and features'; the fidelity is the worst one.
    """
    teachers = dict.fromkeys(name.split("/")[0] for name in losses)
    by_teacher = {
        teacher: sum(loss for name, loss in losses.items() if name.split("/")[0] == teacher)
        for teacher in teachers
    }
    shown = " ".join(f"{teacher} {loss:.2f}" for teacher, loss in by_teacher.items())
    worst = min((row.fidelity for row in rows if not row.merged), default=None)
    fidelity = "" if worst is None else f", fidelity {worst:.2f}"
    rate = f"{images_per_second:.1f} images/s, {wait_share:.0%} waiting for teachers"
    return f"loss {shown}, {rate}{fidelity}"
