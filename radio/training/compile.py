"""torch.compile of the student, with a bound on how often it may compile."""

from __future__ import annotations

import torch

from radio.config import Config
from radio.data.plan import shape_of
from radio.errors import RadioError
from student.model import Student
from student.vit import VisionTransformer

MOST_SHAPES = 16  # a block takes seconds to minutes to compile, once per shape


def compile_student(student: Student, config: Config) -> None:
    """Compile every block in place, anew for each shape that the stages draw.

    One kernel serves all blocks of a shape; state dict and names stay. Positions, adaptors and
    losses run as they are.

    Raises:
        RadioError: the stages draw more than MOST_SHAPES shapes.
    """
    shapes = shapes_of(config)
    if len(shapes) > MOST_SHAPES:
        raise RadioError(
            f"student.compile=true with {len(shapes)} shapes of views (image_sizes x aspects x "
            f"batches), at most {MOST_SHAPES}; shorten the partitions' image_sizes or aspects, "
            "or set student.compile=false"
        )
    # Training, held-out views and the rest of a held-out set each have a version of their own.
    wanted = 4 * len(shapes) + 8
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, wanted)
    backbone = student.backbone
    if isinstance(backbone, VisionTransformer):
        for block in backbone.blocks:
            block.compile(dynamic=False)
    else:
        backbone.trunk.compile(dynamic=False)


def shapes_of(config: Config) -> set[tuple[int, int, int]]:
    """Return every (views, height, width) that a step of the run can have."""
    patch = config.student.patch_size
    return {
        (config.parallel.micro_shard or partition.batch, *shape_of(size, aspect, patch))
        for stage in config.stages
        for partition in stage.partitions.values()
        for size in partition.image_sizes or [partition.image_size]
        for aspect in partition.aspects or [1.0]
    }
