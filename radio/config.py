"""The configuration of a run: its types, and how it is read; the only place that knows Hydra.

`load` composes, checks and returns plain dataclasses; no DictConfig goes further than this file.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from radio.checks import VIEW_MODES, check
from radio.errors import RadioError
from radio.schema import (
    CheckpointConfig,
    ClusterConfig,
    Config,
    DataConfig,
    EvaluationConfig,
    FitConfig,
    LossConfig,
    OptimizerConfig,
    ParallelConfig,
    PartitionConfig,
    PoolConfig,
    StageConfig,
    StudentConfig,
    TeacherCard,
    TeacherConfig,
    ThreadsConfig,
    teachers_of,
)

__all__ = [
    "VIEW_MODES",
    "CheckpointConfig",
    "ClusterConfig",
    "Config",
    "DataConfig",
    "EvaluationConfig",
    "FitConfig",
    "LossConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "PartitionConfig",
    "PoolConfig",
    "StageConfig",
    "StudentConfig",
    "TeacherCard",
    "TeacherConfig",
    "ThreadsConfig",
    "check",
    "choices",
    "config_dir",
    "from_yaml",
    "load",
    "load_teacher",
    "teachers_of",
    "to_yaml",
]


def config_dir() -> Path:
    """Return the folder of YAML files: inside the wheel, or the repository's own."""
    shipped = Path(__file__).parent / "configs"
    return shipped if shipped.is_dir() else Path(__file__).parents[1] / "configs"


def choices(group: str) -> list[str]:
    """Return the names that a config group offers, sorted (`teacher`, `experiment`, ...)."""
    return sorted(path.stem for path in (config_dir() / group).glob("*.yaml"))


def load(overrides: Sequence[str] = ()) -> Config:
    """Compose `configs/train.yaml` with Hydra overrides and return a checked Config.

    Raises:
        RadioError: an unknown key, group or value, a missing field, or a contradiction; the
            message names the key and the way out.
    """
    ConfigStore.instance().store(name="schema", node=Config)
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(config_dir().resolve()), version_base="1.3"):
            composed = compose("train", overrides=list(overrides))
        config = OmegaConf.to_object(composed)
    except (HydraException, OmegaConfBaseException) as error:
        raise RadioError(_explain(error)) from error
    assert isinstance(config, Config)
    check(config)
    return config


def from_yaml(text: str) -> Config:
    """Read back what `to_yaml` wrote."""
    try:
        merged = OmegaConf.merge(OmegaConf.structured(Config), OmegaConf.create(text))
        config = OmegaConf.to_object(merged)
    except (OmegaConfBaseException, yaml.YAMLError) as error:
        raise RadioError(f"not a run's config.yaml: {error}") from error
    assert isinstance(config, Config)
    return config


def to_yaml(config: Config) -> str:
    """Return the resolved configuration as YAML, keys in the order of the dataclasses."""
    return yaml.safe_dump(dataclasses.asdict(config), sort_keys=False)


def load_teacher(name: str) -> TeacherConfig:
    """Read `configs/teacher/<name>.yaml` alone."""
    path = config_dir() / "teacher" / f"{name}.yaml"
    if not path.exists():
        known = ", ".join(choices("teacher"))
        raise RadioError(f"unknown teacher '{name}'; known: {known}")
    merged = OmegaConf.merge(OmegaConf.structured(TeacherConfig), OmegaConf.load(path))
    teacher = OmegaConf.to_object(merged)
    assert isinstance(teacher, TeacherConfig)
    return teacher


def _explain(error: Exception) -> str:
    """Return Hydra's message and, for the usual slips, the way out."""
    missing = re.search(r"missing mandatory value: .*\n\s*full_key: (\S+)", str(error))
    if missing:
        experiments = ", ".join(choices("experiment"))
        return (
            f"{missing[1]} has no value; give {missing[1]}=... or choose an experiment "
            f"(experiment=NAME; there are: {experiments})"
        )
    text = str(error).strip()
    if error.__cause__ is not None and str(error.__cause__) not in text:
        text = f"{text}\n{error.__cause__}"
    if re.search("mismatched input|no viable alternative|LexerNoViableAlt|token recognition", text):
        text += (
            "\nA value with braces, commas or spaces needs quotes of its own inside the shell's: "
            "\"data.train='a-{0..9}.tar'\"; a path goes to a leaf such as data.train="
        )
    elif "Could not override" in text or "not in struct" in text or "not in 'Config'" in text:
        text += "\n`radio train --dry-run experiment=demo` prints every key that exists"
    elif "Could not find" in text:
        groups = ("experiment", "teacher", "student", "data", "cluster")
        text += "".join(f"\n{group}: {', '.join(choices(group))}" for group in groups)
    return text
