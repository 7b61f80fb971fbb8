"""Fit every teacher's standardizer once, before step 0, on the run's own stream.

The spread of its summaries, which the angle loss divides by, is measured on the same views.
"""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from radio.config import Config, teachers_of
from radio.data.configured import fitting_plan
from radio.errors import RadioError
from radio.files import whole
from radio.progress import Report
from radio.targets.angles import angle_dispersion
from radio.targets.standardize import (
    Standardizer,
    load_standardizers,
    make_standardizer,
    read_metadata,
    save_standardizers,
)
from radio.targets.stream import Stream
from radio.targets.target_maker import Request, StandardizerFile

log = logging.getLogger("radio.fit")
DISPERSION = "dispersion"  # the file's metadata: radians squared, empty without summaries
DISPERSION_VIEWS = 16_384  # a spread needs no more; their mean direction must be known first


def fit(
    config: Config,
    stream: Stream,
    progress: Report | None = None,
    stage: int = 0,
    incarnation: int = 0,
) -> dict[str, StandardizerFile]:
    """Return the fitted standardizer file of each teacher of a stage, fitting what is not there.

    Features travel as float32 and unstandardized; statistics merge in step order. A file fitted
    on the same teacher, pictures and plan is reused. Inside a run `incarnation` is the run's, or
    the teachers would take the fit for a dead student's.

    Raises:
        RadioError: `out` holds a standardizer of a teacher that has changed since.
    """
    folder = Path(config.out) / "standardizers" / (f"stage-{stage}" if stage else "")
    names = [name for name in config.teachers if name in teachers_of(config.stages[stage])]
    paths = {name: folder / f"{name}.safetensors" for name in names}
    wanted = {name: _identity(config, stream, name, stage) for name in names}
    if not all(_fits(paths[name], name, wanted[name]) for name in paths):
        folder.mkdir(parents=True, exist_ok=True)
        for name, (standardizer, dispersion) in _fit_all(
            config, stream, progress, stage, incarnation
        ).items():
            measured = {DISPERSION: "" if dispersion is None else repr(dispersion)}
            with whole(paths[name]) as temporary:
                save_standardizers(temporary, {name: standardizer}, wanted[name] | measured)
    return {name: StandardizerFile.of(path) for name, path in paths.items()}


def read_fitted(files: dict[str, StandardizerFile]) -> dict[str, Standardizer]:
    """Load fitted standardizers by teacher."""
    return {name: load_standardizers(Path(file.path))[name] for name, file in files.items()}


def read_dispersions(files: dict[str, StandardizerFile]) -> dict[str, float]:
    """Return the measured spread of the teachers that have summaries, in radians squared."""
    found = {name: read_metadata(Path(file.path))[DISPERSION] for name, file in files.items()}
    return {name: float(dispersion) for name, dispersion in found.items() if dispersion}


def _fit_all(
    config: Config, stream: Stream, progress: Report | None, stage: int, incarnation: int
) -> dict[str, tuple[Standardizer, float | None]]:
    plan = fitting_plan(config, len(stream.sources["train"]), stage)
    standardizers = {
        name: make_standardizer(teacher.standardizer, stream.teachers[name].feature_dim, name)
        for name, teacher in config.teachers.items()
        if name in teachers_of(config.stages[stage])
    }
    summaries: dict[str, list[Tensor]] = {name: [] for name in standardizers}
    specs = (plan(step) for step in range(plan.num_steps))
    request = Request("train", "float32", {})
    for number, batch in enumerate(stream.read(specs, request, incarnation), start=1):
        for partition in batch.partitions:
            for name, target in partition.targets.items():
                rows = target.features.movedim(1, -1)[target.valid]
                standardizers[name].partial_fit(rows)
                if target.summary is not None and _num(summaries[name]) < DISPERSION_VIEWS:
                    summaries[name].append(target.summary)
        if progress is not None:
            progress(number, plan.num_steps)
    for standardizer in standardizers.values():
        standardizer.fit()
    return {
        name: (standardizer, _dispersion(summaries[name]))
        for name, standardizer in standardizers.items()
    }


def _num(summaries: list[Tensor]) -> int:
    return sum(map(len, summaries))


def _dispersion(summaries: list[Tensor]) -> float | None:
    if not summaries:
        return None
    return float(angle_dispersion(torch.cat(summaries)[:DISPERSION_VIEWS].double()))


def _identity(config: Config, stream: Stream, name: str, stage: int) -> dict[str, str]:
    """Return what a fit depends on, as the file's metadata."""
    teacher = config.teachers[name]
    plan = {
        "seed": config.seed,
        "steps": config.fit.steps,
        "crop_scale": config.data.crop_scale,
        "micro_batch": teacher.micro_batch or config.data.micro_batch,
        "repeat_epochs": config.data.repeat_epochs,
        "patch_size": config.student.patch_size,
        "micro_shard": config.parallel.micro_shard,
        "shift_margin": config.data.shift_margin,
        "teacher": [teacher.upsample, teacher.upsampler, teacher.precision],
        "grid": config.losses.grid,
        "partitions": asdict(config.stages[stage])["partitions"],
    }
    return {
        "kind": teacher.standardizer,
        "teacher": stream.teachers[name].fingerprint,
        "data": stream.sources["train"].fingerprint,
        "plan": hashlib.sha256(json.dumps(plan, sort_keys=True).encode()).hexdigest(),
    }


def _fits(path: Path, name: str, wanted: dict[str, str]) -> bool:
    if not path.exists():
        return False
    found = read_metadata(path)
    changed = [key for key, value in wanted.items() if found.get(key) != value]
    if "teacher" in changed:
        raise RadioError(
            f"{path} was fitted on another teacher '{name}' (its weights or options changed since);"
            " choose another out=, or delete the file to fit again"
        )
    if changed:
        log.info("fitting again: the %s of %s changed", ", ".join(changed), path)
    return not changed
