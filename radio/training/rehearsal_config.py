"""What of a run is rehearsed: the configuration, made as small as one step at full size can be."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from radio.config import (
    Config,
    ParallelConfig,
    PartitionConfig,
    StudentConfig,
    load,
    teachers_of,
)
from radio.errors import RadioError

VIEWS = 2  # of each partition, at most; a mosaic of so few is one canvas
STEP_VIEWS = 4  # of all partitions, at most
FIT_STEPS = 3  # at most, of a teacher's smallest partition


def rehearsal_config(overrides: Sequence[str]) -> Config:
    """Load a run's configuration; a rehearsal may leave out data.train, "" is the photographs.

    Those are the demo's, whole, out of the wheels of scikit-image and scikit-learn.
    """
    given = {override.split("=", 1)[0].lstrip("+") for override in overrides}
    if "rehearsal" in given and "data.train" not in given:
        config = load([*overrides, "data.train="])
        if config.rehearsal:
            return config
    return load(overrides)


def lowered(config: Config, scratch: Path) -> Config:
    """Return what is rehearsed of a run: one step of its last stage on a few views, on the CPU.

    Weights are seeded, nothing is compiled, a partition of several sizes has its `image_size`, and
    the trunk learns. To save memory a teacher sees one picture at a time, and a student's blocks
    are computed twice. What must be written goes to `scratch`.

    Raises:
        RadioError: fewer pictures than the stage has partitions.
    """
    stage = config.stages[-1]
    train = config.data.train or str(_photographs(scratch / "pictures"))
    views = _views(train, list(stage.partitions))
    partitions = {
        name: replace(partition, batch=min(views, partition.batch), image_sizes=[])
        for name, partition in stage.partitions.items()
    }
    teachers = {
        name: replace(teacher, pretrained=None, compile=False)
        for name, teacher in config.teachers.items()
        if name in teachers_of(stage)
    }
    one_step = replace(stage, steps=1, frozen_trunk_steps=0, refit=False, partitions=partitions)
    return replace(
        config,
        out=str(scratch),
        stream="local",
        cache=None,
        device="cpu",
        threads=replace(config.threads, teacher=config.threads.student),
        data=replace(config.data, train=train, val=None, micro_batch=1),
        student=_seeded(config.student),
        students={name: _seeded(student) for name, student in config.students.items()},
        teachers=teachers,
        parallel=ParallelConfig(),
        stages=[one_step],
    )


def _seeded(student: StudentConfig) -> StudentConfig:
    return replace(student, init=None, compile=False, checkpointing=True)


def _views(train: str, partitions: Sequence[str]) -> int:
    """Return the views that each partition gets."""
    from radio.data.shards import open_images  # slow import

    pictures = len(open_images(train))
    if pictures < len(partitions):
        raise RadioError(
            f"data.train={train} has {pictures} pictures, but a step needs one for each of the "
            f"partitions {', '.join(partitions)}; add pictures, or leave data.train out to "
            "rehearse on photographs of scikit-image and scikit-learn"
        )
    return min(VIEWS, max(1, min(STEP_VIEWS, pictures) // len(partitions)))


def _photographs(folder: Path) -> Path:
    from radio.data.photographs import TRAIN, photograph  # slow import

    folder.mkdir(parents=True)
    for name in TRAIN:
        photograph(name).save(folder / f"{Path(name).stem}.png", compress_level=1)
    return folder


def alone(config: Config, name: str) -> Config:
    """Return the part of a run that a teacher's standardizer is fitted on: its smallest partition.

    As many steps as give a feature vector for each channel, so that a covariance can have full
    rank, FIT_STEPS at most.
    """
    stage, teacher = config.stages[0], config.teachers[name]
    shown = {key: each for key, each in stage.partitions.items() if name in each.views}
    key = min(shown, key=lambda each: shown[each].image_size)
    partition = replace(shown[key], views={name: shown[key].views[name]})
    vectors = partition.batch * _least_positions(config, name, partition)
    steps = min(FIT_STEPS, math.ceil(teacher.card.feature_dim / vectors))
    return replace(
        config,
        teachers={name: teacher},
        fit=replace(config.fit, steps=steps),
        stages=[replace(stage, partitions={key: partition})],
    )


def _least_positions(config: Config, name: str, partition: PartitionConfig) -> int:
    """Return the positions of a view on the coarser of the student's and the native grid."""
    teacher = config.teachers[name]
    student = partition.image_size // config.student.patch_size * teacher.upsample
    native = teacher.card.native_size // teacher.card.stride
    return min(student, native) ** 2 if partition.views[name] == "native" else student**2
