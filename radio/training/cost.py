"""What a run costs, from the teachers' cards and the student's shape, before anything is built."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

from radio.config import Config, PartitionConfig, StageConfig, StudentConfig
from radio.data.configured import canvas_of
from radio.errors import RadioError
from student.vit import SIZES, VitShape

PREFIX_TOKENS = 8  # CLS rows and registers
TRAINING = 3  # a forward and a backward of twice its cost
# One A100 in bfloat16 at the 40 % that well-tuned ViT training reaches.
GPU_TFLOPS = 312 * 0.4


@dataclass(frozen=True)
class StageCost:
    """TFLOP of one step of a stage, by teacher and of the student, and the number of its steps."""

    teachers: dict[str, float]
    student: float
    steps: int

    @property
    def tflop(self) -> float:
        """Everything in one step."""
        return self.student + sum(self.teachers.values())

    @property
    def gpu_hours(self) -> float:
        """Hours of one A100 at GPU_TFLOPS for the whole stage."""
        return self.tflop * self.steps / GPU_TFLOPS / 3600


def stage_cost(config: Config, stage: StageConfig) -> StageCost:
    """Return what a stage costs; reading pictures, adaptors and optimizer are not counted.

    MESA's average takes one more forward of every student.
    """
    passes = TRAINING + (1 if config.losses.mesa_weight else 0)
    students = [config.student, *config.students.values()]
    teachers: dict[str, float] = {}
    student = 0.0
    for partition in stage.partitions.values():
        sizes = partition.image_sizes or [partition.image_size]
        for size in sizes:  # each is drawn as often as the others
            views = partition.batch / len(sizes)
            student += passes * views * sum(student_gflop(s, size) for s in students) / 1e3
            for name in partition.views:
                cost = views * teacher_gflop(config, name, partition, size) / 1e3
                teachers[name] = teachers.get(name, 0.0) + cost
    return StageCost(teachers, student, stage.steps)


def teacher_gflop(config: Config, name: str, partition: PartitionConfig, size: int) -> float:
    """Return a teacher's GFLOP for one view of a partition at `size` px."""
    card, mode = config.teachers[name].card, partition.views[name]
    if mode == "match":
        side = size // config.student.patch_size * card.stride
        return card.gflops * (side / card.native_size) ** 2  # as if attention grew no faster
    if mode == "mosaic":
        return card.gflops / canvas_of(config, name, size).views_per_canvas
    if mode == "tiled":
        return card.gflops * math.ceil(size / card.native_size) ** 2
    return card.gflops


def student_gflop(student: StudentConfig, size: int) -> float:
    """Return a student's GFLOP for one forward of a square picture, windows not considered.

    Raises:
        RadioError: an unknown size.
    """
    if student.backbone is not None:
        return trunk_gflop(student.backbone, size)
    shape = SIZES.get(student.size)
    if shape is None:
        raise RadioError(f"student.size is '{student.size}'; known: {', '.join(SIZES)}")
    return vit_gflop(shape, size, student.patch_size)


@functools.cache
def trunk_gflop(name: str, size: int) -> float:
    """Return the GFLOP of a timm trunk's forward, counted on tensors without data."""
    import timm  # slow import
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"):
        trunk: Any = timm.create_model(name, pretrained=False).eval()
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            trunk.forward_features(torch.empty(1, 3, size, size))
    return float(counter.get_total_flops()) / 1e9


def vit_gflop(shape: VitShape, size: int, patch: int) -> float:
    """Return a ViT's GFLOP (2 per multiply-add) for one forward of a square picture."""
    patches = (size // patch) ** 2
    tokens = patches + PREFIX_TOKENS
    weights = shape.depth * (4 * shape.width**2 + 2 * shape.width * shape.mlp_hidden)
    attention = shape.depth * 2 * tokens**2 * shape.width
    embedding = patches * 3 * patch**2 * shape.width
    return 2 * (tokens * weights + attention + embedding) / 1e9
