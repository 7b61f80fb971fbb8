"""The plans that a configuration stands for, refusing views that cannot be packed or windowed."""

from __future__ import annotations

from radio.config import Config, PartitionConfig
from radio.data.mosaic import Mosaic
from radio.data.plan import PartitionPlan, Plan, StagePlan, shape_of, windows_for
from radio.errors import RadioError


def stage_plans(config: Config) -> list[StagePlan]:
    """Return the stages as the plan needs them.

    Raises:
        RadioError: views that cannot be packed on a mosaic teacher's canvas, with the nearest
            sizes that can.
    """
    for stage in config.stages:
        for name, partition in stage.partitions.items():
            _check_mosaics(config, name, partition)
            _check_windows(config, name, partition)
    return [
        StagePlan(
            stage.steps,
            tuple(
                PartitionPlan(
                    name,
                    partition.image_size,
                    partition.batch,
                    dict(partition.views),
                    config.student.merge_per_block
                    if partition.merge_per_block is None
                    else partition.merge_per_block,
                    tuple(partition.image_sizes),
                    partition.window,
                    tuple(partition.aspects),
                    config.student.patch_size,
                    config.data.shift_margin,
                    config.parallel.micro_shard,
                    tuple(partition.windows),
                )
                for name, partition in stage.partitions.items()
            ),
        )
        for stage in config.stages
    ]


def canvas_of(config: Config, teacher: str, size: int) -> Mosaic:
    """Return a mosaic teacher's canvas of views at `size` px, each read at the student's own grid.

    A teacher of stride 14 sees a student's 256 px in patches of 16 at 224 px, so nothing is resized
    afterwards. ValueError for views that do not fit.
    """
    described, patch = config.teachers[teacher], config.student.patch_size
    card = described.card
    side = size // patch * described.upsample * card.stride
    return Mosaic(card.native_size, side, card.stride)


def _check_mosaics(config: Config, name: str, partition: PartitionConfig) -> None:
    for teacher, mode in partition.views.items():
        if mode not in ("mosaic", "padded"):
            continue
        for size in (partition.image_size, *partition.image_sizes):
            try:
                canvas_of(config, teacher, size)
            except ValueError as error:
                raise RadioError(
                    f"partition '{name}' cannot be packed for teacher '{teacher}': {error}"
                ) from error


def _check_windows(config: Config, name: str, partition: PartitionConfig) -> None:
    patch = config.student.patch_size
    for size in partition.image_sizes or [partition.image_size]:
        for aspect in partition.aspects or [1.0]:
            shape = shape_of(size, aspect, patch)
            if partition.windows and not windows_for(partition.windows, shape, patch):
                raise RadioError(
                    f"partition '{name}' has windows {partition.windows}, of which none tiles the "
                    f"{shape[0] // patch} x {shape[1] // patch} tokens of {shape[0]} x {shape[1]} "
                    "px; add one that does, or 0 for none"
                )


def training_plan(config: Config, num_samples: int) -> Plan:
    """Return the plan of a run over `num_samples` pictures."""
    return Plan(config.seed, num_samples, stage_plans(config), config.data.repeat_epochs)


def fitting_plan(config: Config, num_samples: int, stage: int = 0) -> Plan:
    """Return the plan that a stage's standardizers are fitted on: `fit.steps` steps of its own."""
    stages = [StagePlan(config.fit.steps, stage_plans(config)[stage].partitions)]
    return Plan(config.seed, num_samples, stages, config.data.repeat_epochs)
