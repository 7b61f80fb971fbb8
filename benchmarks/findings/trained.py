"""One arm with one seed: its run, trained where it is not there yet, and its encoder."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from benchmarks.findings.declare import TEACHERS, Arm
from benchmarks.findings.material import Material
from benchmarks.findings.shared_stream import SharedStream
from radio.config import Config, load
from radio.encoder.fuse import weights_of
from radio.evaluation.target_kinds import EncoderTarget, TeacherTarget
from radio.files import sha256_of, write_whole
from radio.training.checkpoint import Checkpoint, load_checkpoint, newest_checkpoint
from radio.training.distill import distill
from radio.training.run_folder import FREE
from teachers.weights import local_file

FACTORS = "factors.json"  # in every run: what its teachers are scaled by


@dataclass(frozen=True)
class Workshop:
    """What all arms have in common: folders, pictures, the family of teachers, further overrides.

    `steps` is that of configs/experiment/finding.yaml if not given.
    """

    folder: Path
    material: Material
    family: str = "pocket"
    steps: int | None = None
    overrides: tuple[str, ...] = ()

    def config(self, arm: Arm, seed: int) -> Config:
        """Return an arm's checked configuration; `out` is named by what the run computes."""
        shared = [
            "experiment=finding",
            f"data.train='{self.material.train}'",
            f"cache={self.folder / 'targets'}",
            f"seed={seed}",
            *self.overrides,
            *(f"teacher@teachers.{name}={self.family}_{name}" for name in TEACHERS),
        ]
        steps = self.steps or load(shared).stages[0].steps
        config = load([*shared, *arm.overrides, f"stages.0.steps={steps}"])
        out = self.folder / "runs" / identity(config, arm)[:12] / f"seed-{seed}"
        return dataclasses.replace(config, out=str(out))


def identity(config: Config, arm: Arm) -> str:
    """Return a SHA-256 over what an arm trains on and how; the seed and what is free left out."""
    values = _chosen(config)
    for key in {"seed", *FREE} & values.keys():
        del values[key]
    del values["data"]["train"]
    pretrained = {name: teacher.pretrained for name, teacher in config.teachers.items()}
    files = {name: local_file(name, given) for name, given in pretrained.items() if given}
    said = {
        "config": values,
        "deviations": arm.deviations and dict(arm.deviations),
        "weights": {name: sha256_of(file) for name, file in files.items() if file},
    }
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def _chosen(part: Any) -> Any:
    """Return values as plain types, less those that are a dataclass's defaults.

    What is measured stays known when a later version has more to choose from; a version that
    changes a default must raise records.VERSION, or it would be taken for what it was.
    """
    if isinstance(part, Mapping):
        return {key: _chosen(value) for key, value in part.items()}
    if isinstance(part, list):
        return [_chosen(value) for value in part]
    if not dataclasses.is_dataclass(part):
        return part
    return {
        field.name: _chosen(value)
        for field in dataclasses.fields(part)
        if (value := getattr(part, field.name)) != _default(field)
    }


def _default(field: dataclasses.Field[Any]) -> Any:
    make = field.default_factory
    return field.default if make is dataclasses.MISSING else make()


@dataclass(frozen=True)
class Trained:
    """A finished run to be measured.

    `factors` are what its teachers' features were multiplied with; what an adaptor says is to be
    divided by it, to be in the teacher's own space.
    """

    arm: Arm
    config: Config
    checkpoint: Checkpoint
    material: Material
    factors: Mapping[str, float]

    @cached_property
    def target(self) -> EncoderTarget:
        """The encoder, whose features are not worth keeping on disk."""
        target = EncoderTarget(self.arm.name, weights_of(self.checkpoint))
        target.is_kept = False
        return target

    @cached_property
    def teachers(self) -> dict[str, TeacherTarget]:
        """The teachers as they are, by name."""
        return {
            name: TeacherTarget(name, teacher, self.config.seed)
            for name, teacher in self.config.teachers.items()
        }


def trained(workshop: Workshop, arm: Arm, seed: int) -> Trained:
    """Return an arm's finished run, training or resuming it first where it is not.

    Raises:
        RadioError: as `distill`.
    """
    config = workshop.config(arm, seed)
    factors = Path(config.out) / FACTORS
    if not factors.exists():
        with contextlib.closing(SharedStream(config, arm.deviations)) as stream:
            distill(config, stream)
            write_whole(factors, json.dumps(stream.factors))
    newest = newest_checkpoint(Path(config.out) / "checkpoints")
    assert newest is not None, "distill ends with a checkpoint"
    checkpoint = load_checkpoint(newest)
    return Trained(arm, config, checkpoint, workshop.material, json.loads(factors.read_text()))
