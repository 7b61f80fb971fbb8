"""The student's forward over a whole step, one micro-shard at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from radio.data.plan import seed_for
from radio.targets.stream import PartitionBatch, StepBatch
from student.model import Student, StudentOutput
from student.spectral import iterate_spectral
from student.vit import VitOutput


@dataclass(frozen=True)
class Prediction:
    """What the student makes of a partition: its own tokens, and each teacher's prediction."""

    tokens: VitOutput
    outputs: dict[str, StudentOutput]

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return self.tokens.features.shape[-2], self.tokens.features.shape[-1]


class Predictor(nn.Module):
    """Predict every partition of a step in one call, as DDP and FSDP want it.

    What is random in a forward (viewports of the positions, stochastic depth) is drawn by (step,
    partition, micro-shard), so it does not depend on the process that computes it.
    """

    def __init__(self, student: Student, seed: int) -> None:
        super().__init__()
        self.student = student
        self.seed = seed

    def forward(self, batch: StepBatch, device: torch.device) -> list[Prediction]:
        """Return a prediction for each partition of the batch."""
        if self.student.training:
            iterate_spectral(self.student)
        return [self._predict(partition, batch.step, device) for partition in batch.partitions]

    def _predict(self, partition: PartitionBatch, step: int, device: torch.device) -> Prediction:
        images = partition.images.to(device)
        parts = images.split(len(images) // len(partition.shards))
        outputs = []
        for shard, part in zip(partition.shards, parts, strict=True):
            torch.manual_seed(seed_for(self.seed, f"student/{partition.name}", step, shard))
            outputs.append(self.student.backbone(part, partition.merge_per_block, partition.window))
        tokens = _one_after_the_other(outputs)
        return Prediction(tokens, self.student.predict(tokens))


def _one_after_the_other(outputs: Sequence[VitOutput]) -> VitOutput:
    if len(outputs) == 1:
        return outputs[0]
    return VitOutput(
        torch.cat([output.cls for output in outputs]),
        torch.cat([output.registers for output in outputs]),
        torch.cat([output.features for output in outputs]),
    )
