"""Find out what the word behind `radio evaluate` means."""

from __future__ import annotations

from pathlib import Path

import yaml

from radio.config import TeacherCard, TeacherConfig, choices, load_teacher
from radio.encoder.folder import read_weights
from radio.encoder.fuse import weights_of
from radio.encoder.shipped import shipped
from radio.errors import RadioError
from radio.evaluation.target import Target
from radio.evaluation.target_kinds import EncoderTarget, PixelsTarget, TeacherTarget
from radio.evaluation.timm_target import TimmTarget, timm_target
from radio.training.checkpoint import find_checkpoint

__all__ = [
    "EncoderTarget",
    "PixelsTarget",
    "Target",
    "TeacherTarget",
    "TimmTarget",
    "read_teacher",
    "resolve",
]

TIMM = "timm:"
PIXELS = "pixels"
YAML = (".yaml", ".yml")
EXPECTED = (
    "an encoder folder, one of NVIDIA's .pth.tar files, a run folder or one of its checkpoints, a "
    "teacher's YAML"
)


def resolve(target: str | Path) -> Target:
    """Return the target that a path or a name means.

    In this order: "pixels"; "timm:NAME"; a path to an encoder folder, NVIDIA's file, a run folder
    or checkpoint (fused in memory), or a teacher's YAML; the name of an encoder that ships; a name
    of configs/teacher; a timm model's name, whose pretrained weights timm loads.

    Raises:
        RadioError: none of these (all that was tried is listed), or weights that cannot be had.
    """
    name = str(target)
    if name == PIXELS:
        return PixelsTarget()
    if name.startswith(TIMM):
        return timm_target(name, name.removeprefix(TIMM))
    path = Path(target)
    if path.exists():
        return _at(name, path)
    if name in shipped():
        return EncoderTarget(name, read_weights(shipped()[name]))
    if name in choices("teacher"):
        return TeacherTarget(name, load_teacher(name))
    import timm

    if timm.is_model(name):
        return timm_target(name, name)
    encoders, teachers = (", ".join(names) for names in (shipped(), choices("teacher")))
    raise RadioError(
        f"unknown target '{name}': no path to {EXPECTED}; no encoder that ships "
        f"({encoders or 'none does here'}); no teacher ({teachers}); no timm model "
        f"(timm.list_models()); not '{PIXELS}'"
    )


def _at(name: str, path: Path) -> Target:
    if path.is_file() and path.suffix in YAML:
        return TeacherTarget(path.stem, read_teacher(path))
    if path.is_file() or (path / "config.json").exists():
        return EncoderTarget(name, read_weights(path))
    if (path / "state.yaml").exists() or (path / "checkpoints").is_dir():
        return EncoderTarget(name, weights_of(find_checkpoint(path)))
    found = ", ".join(sorted(item.name for item in path.iterdir())[:8]) or "nothing"
    raise RadioError(f"{path} holds {found}; expected {EXPECTED}, or {TIMM}NAME for a timm model")


def read_teacher(path: Path) -> TeacherConfig:
    """Read a teacher's YAML of the form of configs/teacher.

    Raises:
        RadioError: no YAML mapping, an unknown or missing key.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RadioError(f"{path} is no YAML: {error}") from error
    if not isinstance(values, dict) or not isinstance(values.get("kind"), str):
        raise RadioError(
            f"{path} is no teacher: expected kind, options, ... as configs/teacher has"
        )
    try:
        card = TeacherCard(**(values.pop("card", None) or {}))
        return TeacherConfig(**values, card=card)
    except TypeError as error:
        raise RadioError(f"{path}: {error}; configs/teacher has examples") from error
