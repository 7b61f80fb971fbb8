"""Every override changes its own key alone, and the losses that it should alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import pytest
import yaml
from test_distill import losses_of
from tiny import tiny_config

from radio import config as configuration
from radio.checks import check
from radio.config import Config, load, to_yaml
from radio.training.distill import distill
from radio.training.losses import FEATURE_LOSSES, SUMMARY_LOSSES

pytestmark = pytest.mark.usefixtures("no_report")
# Keys of Hydra's own shape (groups, lists of dataclasses), which overrides reach by their leaves.
CONTAINERS = ("teachers", "students", "stages", "pools")


def leaves(section: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every scalar key of the configuration with its type."""
    hints = get_type_hints(section)
    for field in dataclasses.fields(section):
        hint = hints[field.name]
        if dataclasses.is_dataclass(hint):
            yield from leaves(hint, f"{prefix}{field.name}.")  # type: ignore[arg-type]
        elif field.name not in CONTAINERS:
            yield f"{prefix}{field.name}", hint


def another(hint: Any, value: Any) -> Any:
    """Return some other value of the type."""
    kinds = [kind for kind in (get_args(hint) or (hint,)) if kind is not type(None)]
    if get_origin(hint) in (list, dict):
        kinds = []
    if bool in kinds:
        return not value
    if int in kinds:
        return (value or 0) + 3
    if float in kinds:
        return 0.5 if value is None else value + 0.5
    if str in kinds:
        return "other"
    return [0.25, 0.75] if isinstance(value, list) else {"momentum": 0.5}


def flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict) or not value:
        return {prefix: value}
    return {k: v for name, item in value.items() for k, v in flat(item, f"{prefix}.{name}").items()}


@pytest.fixture(scope="module")
def resolved() -> dict[str, Any]:
    return flat(yaml.safe_load(to_yaml(load(["experiment=demo"]))))


@pytest.mark.parametrize(("key", "hint"), list(leaves(Config)), ids=[k for k, _ in leaves(Config)])
def test_an_override_changes_its_key_and_no_other(
    key: str, hint: Any, resolved: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(configuration, "check", lambda config: None)  # any value is as good
    before = resolved.get(f".{key}")
    value = another(hint, before)
    text = str(value).replace(" ", "").replace("'", "").replace("None", "null")
    plus = "+" if isinstance(value, dict) else ""
    after = flat(yaml.safe_load(to_yaml(load(["experiment=demo", f"{plus}{key}={text.lower()}"]))))
    changed = {k for k in resolved.keys() | after.keys() if resolved.get(k) != after.get(k)}
    assert {k[1:] for k in changed} - {key} <= {f"{key}.momentum"} and changed


def setting(path: str, value: object) -> Callable[[Config], None]:
    """Return what sets a dotted key; a number or name walks lists and dicts."""

    def change(config: Config) -> None:
        *parents, last = path.split(".")
        here: Any = config
        for name in parents:
            if isinstance(here, list):
                here = here[int(name)]
            else:
                here = here[name] if isinstance(here, dict) else getattr(here, name)
        if isinstance(here, dict):
            here[last] = value
        else:
            setattr(here, last, value)

    return change


FEATURES = {"words/features", "parts/features", "edges/features"}
SUMMARIES = {"words/summary", "parts/summary"}
ALL = FEATURES | SUMMARIES
LOW, HIGH = "stages.0.partitions.low", "stages.0.partitions.high"
# The losses of the first step that a change must move; every other one keeps its bits.
FIRST_STEP: dict[str, tuple[list[tuple[str, object]], set[str]]] = {
    "lr": ([("optimizer.lr", 3e-3)], set()),
    "weight_decay": ([("optimizer.weight_decay", 0.3)], set()),
    "warmup_steps": ([("optimizer.warmup_steps", 3)], set()),
    "lamb": ([("optimizer.name", "lamb")], set()),
    "muon": ([("optimizer.name", "muon")], set()),
    "ema_decay": ([("optimizer.ema_decay", 0.5)], set()),
    "clip_norm": ([("optimizer.clip_norm", 0.1)], set()),
    "stage_lr": ([("stages.0.lr", 1e-5)], set()),
    "frozen_trunk_steps": ([("stages.0.frozen_trunk_steps", 1)], set()),
    "ada_loss": ([("losses.balance", "ada_loss")], set()),
    "teacher_dropping": ([("losses.balance", "teacher_dropping")], set()),
    "feature_weight": ([("teachers.words.feature_weight", 3.0)], set()),
    "summary_weight": ([("teachers.words.summary_weight", 3.0)], set()),
    "checkpointing": ([("student.checkpointing", True)], set()),
    "log_every_steps": ([("log_every_steps", 2)], set()),
    "cache": ([("cache", "kept"), ("data.repeat_epochs", 1)], set()),
    **{name: ([("losses.feature", name)], FEATURES) for name in FEATURE_LOSSES if name != "mse"},
    **{
        name: ([("losses.summary", name)], SUMMARIES) for name in SUMMARY_LOSSES if name != "cosine"
    },
    "larger": ([("losses.grid", "larger")], {"words/features"}),
    "standardizer": ([("teachers.parts.standardizer", "global_scale")], {"parts/features"}),
    "fit_steps": ([("fit.steps", 1)], FEATURES),
    "int8": ([("codec", "int8")], FEATURES),
    "native": ([(f"{LOW}.views.edges", "native")], {"edges/features"}),
    "window": ([(f"{HIGH}.merge_per_block", 0), (f"{HIGH}.window", 2)], ALL),
    "merge_per_block": ([(f"{HIGH}.merge_per_block", 0)], ALL),
    "drop_path": ([("student.drop_path", 0.5)], ALL),
    "damp": ([("student.damp", 0.1)], ALL),
    "seed": ([("seed", 1)], ALL),
    "crop_scale": ([("data.crop_scale", [0.1, 0.3])], ALL),
    "shift_margin": ([("data.shift_margin", 1)], ALL),
    "image_size": ([(f"{LOW}.image_size", 16)], ALL),
    "micro_batch": ([("data.micro_batch", 2), ("evaluation.views", 1)], set()),
}


def first_losses(config: Config) -> dict[str, float]:
    config.data.val = None
    return losses_of(distill(config).out)[0]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> dict[str, float]:
    return first_losses(tiny_config(tmp_path_factory.mktemp("plain"), steps=1))


@pytest.mark.parametrize("name", FIRST_STEP)
def test_an_override_moves_the_losses_it_should_and_no_other(
    name: str, plain: dict[str, float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # a cache's folder may be relative
    changes, moved = FIRST_STEP[name]
    config = tiny_config(tmp_path, steps=1)
    for path, value in changes:
        setting(path, value)(config)
    check(config)
    losses = first_losses(config)
    assert losses.keys() == plain.keys()
    assert {key for key in plain if losses[key] != plain[key]} == moved
