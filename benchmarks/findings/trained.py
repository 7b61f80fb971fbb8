"""One arm with one seed: its run, trained where it is not there yet, and its encoder."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import yaml

from benchmarks.findings.declare import TEACHERS, Arm
from benchmarks.findings.material import Material
from benchmarks.findings.shared_stream import SharedStream
from radio.config import Config, config_dir, load
from radio.encoder.fuse import weights_of
from radio.evaluation.target_kinds import EncoderTarget, TeacherTarget
from radio.training.checkpoint import Checkpoint, load_checkpoint, newest_checkpoint
from radio.training.distill import distill

EXPERIMENT = "finding"
FACTORS = "factors.json"  # in a run whose teachers are scaled
RUNS, TARGETS = "runs", "targets"  # below the workshop
POCKET = "pocket"  # the family of teachers that the experiment names


def _steps() -> int:
    """Return the steps that the experiment says, which arms with stages of their own take over."""
    text = (config_dir() / "experiment" / f"{EXPERIMENT}.yaml").read_text(encoding="utf-8")
    return int(yaml.safe_load(text)["stages"][0]["steps"])


@dataclass(frozen=True)
class Workshop:
    """What all arms have in common: folders, pictures, the family of teachers, further overrides.

    `steps` is that of configs/experiment/finding.yaml if not given.
    """

    folder: Path
    material: Material
    family: str = POCKET
    steps: int | None = None
    overrides: tuple[str, ...] = ()

    def config(self, arm: Arm, seed: int) -> Config:
        """Return an arm's checked configuration."""
        shared = [
            f"experiment={EXPERIMENT}",
            f"data.train='{self.material.train}'",
            f"cache={self.folder / TARGETS}",
            f"seed={seed}",
            *self.overrides,
            *self._family(),
        ]
        steps = self.steps or _steps()
        config = load([*shared, *arm.overrides, f"stages.0.steps={steps}"])
        return dataclasses.replace(config, out=str(self._out(config, arm)))

    def _family(self) -> list[str]:
        if self.family == POCKET:
            return []
        return [f"teacher@teachers.{name}={self.family}_{name}" for name in TEACHERS]

    def _out(self, config: Config, arm: Arm) -> Path:
        """Name a run by what it computes, so that findings share it."""
        digest = identity(config, arm)
        return self.folder / RUNS / digest[:12] / f"seed-{config.seed}"


def identity(config: Config, arm: Arm) -> str:
    """Return a SHA-256 over what an arm trains on and how, the seed and all folders left out."""
    values = dataclasses.asdict(config)
    for key in ("out", "cache", "seed", "threads"):
        del values[key]
    values["data"] = {key: value for key, value in values["data"].items() if key != "train"}
    said = {"config": values, "deviations": arm.deviations and dict(arm.deviations)}
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


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
    factors: Mapping[str, float] = field(default_factory=dict)

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
    checkpoint = _finished(config)
    if checkpoint is None:
        with contextlib.closing(SharedStream(config, arm.deviations)) as stream:
            distill(config, stream)
            (Path(config.out) / FACTORS).write_text(json.dumps(stream.factors))
        checkpoint = _finished(config)
        assert checkpoint is not None, "distill ends with a checkpoint"
    factors = json.loads((Path(config.out) / FACTORS).read_text())
    return Trained(arm, config, checkpoint, workshop.material, factors)


def _finished(config: Config) -> Checkpoint | None:
    path = newest_checkpoint(Path(config.out) / "checkpoints")
    if path is None or not (Path(config.out) / FACTORS).exists():
        return None
    checkpoint = load_checkpoint(path)
    return checkpoint if checkpoint.step == sum(s.steps for s in config.stages) else None
