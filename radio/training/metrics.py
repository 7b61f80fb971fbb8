"""Held-out fidelity, how much of a teacher's features the student explains; the training line."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from radio.targets.grid import to_grid
from radio.targets.stream import PartitionBatch, StepBatch
from student.model import Student, StudentOutput


class Fidelity:
    """Accumulate sum (y - mean y)^2 / sum (prediction - y)^2 over valid positions, float64.

    The mean is per channel, of the accumulated set itself; 1 means that the student does no
    better than predicting it.
    """

    def __init__(self) -> None:
        self.count = 0.0
        self.total = torch.zeros((), dtype=torch.float64)
        self.squares = torch.zeros((), dtype=torch.float64)
        self.residual = 0.0

    def update(
        self,
        predicted: Float[Tensor, "b c h w"],
        target: Float[Tensor, "b c h w"],
        valid: Bool[Tensor, "b h w"],
    ) -> None:
        """Add a batch."""
        y = target.double().movedim(1, -1)[valid]
        error = predicted.double().movedim(1, -1)[valid] - y
        self.count += len(y)
        self.total = self.total + y.sum(0)
        self.squares = self.squares + y.square().sum(0)
        self.residual += float(error.square().sum())

    @property
    def value(self) -> float:
        """The ratio; larger is better, infinite for a prediction without error."""
        spread = float((self.squares - self.total.square() / self.count).sum())
        return spread / self.residual if self.residual else math.inf


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


@torch.inference_mode()
def held_out_rows(
    student: Student, batches: Iterable[StepBatch], device: torch.device
) -> list[Row]:
    """Measure a student on held-out batches, once plain and once merged where a partition merges.

    Batches hold one partition each (`Plan.held_out`); targets should travel as float32.
    """
    scores: dict[tuple[str, int, bool], tuple[Fidelity, list[Tensor]]] = {}
    with _at_rest(student):
        for batch in batches:
            for partition in batch.partitions:
                for merge in sorted({0, partition.merge_per_block}):
                    outputs = student(partition.images.to(device), merge, partition.window)
                    _add(scores, partition, outputs, merge > 0)
    return [
        Row(
            teacher,
            size,
            merged,
            fidelity.value,
            float(torch.cat(cosines).mean()) if cosines else None,
        )
        for (teacher, size, merged), (fidelity, cosines) in scores.items()
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
    scores: dict[tuple[str, int, bool], tuple[Fidelity, list[Tensor]]],
    partition: PartitionBatch,
    outputs: dict[str, StudentOutput],
    merged: bool,
) -> None:
    size = partition.images.shape[-1]
    for name, target in partition.targets.items():
        fidelity, cosines = scores.setdefault((name, size, merged), (Fidelity(), []))
        output = outputs[name]
        grid = (target.features.shape[-2], target.features.shape[-1])
        predicted = to_grid(output.features.float().cpu(), grid)
        fidelity.update(predicted, target.features, target.valid)
        if output.summary is not None and target.summary is not None:
            cosines.append(F.cosine_similarity(output.summary.float().cpu(), target.summary))


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
