"""Options of the recipe inside real runs: each changes what it should, resumes, and averages."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from test_distill import DyingStream, Killed, losses_of, rows_of
from test_stages import two_stages
from tiny import tiny_config

from radio.config import Config, check
from radio.encoder.fuse import weights_of
from radio.errors import RadioError
from radio.evaluation.evaluate import evaluate
from radio.training.balance import BALANCES
from radio.training.checkpoint import find_checkpoint
from radio.training.distill import distill
from radio.training.learner import build_balance

pytestmark = pytest.mark.usefixtures("no_report")


def with_options(config: Config, **options: object) -> Config:
    """Set `section__key` options."""
    for name, value in options.items():
        section, key = name.split("__")
        setattr(getattr(config, section), key, value)
    check(config)
    return config


# What every loss and grid moves is in test_overrides.
OPTIONS: dict[str, dict[str, object]] = {
    "damp": {"student__damp": 0.1},
    "ada_loss": {"losses__balance": "ada_loss"},
    "teacher_dropping": {"losses__balance": "teacher_dropping"},
    "ema": {"optimizer__ema_decay": 0.9},
    "lamb": {"optimizer__name": "lamb"},
    "muon": {"optimizer__name": "muon"},
    "spectral": {"student__spectral": True},
    "drop_path": {"student__drop_path": 0.3},
    "checkpointing": {"student__checkpointing": True},
    "attention": {"student__adaptor_kind": "attention"},
}
# Those with a state or with random numbers of their own, which a resumed run must find again.
CARRIED = ("damp", "ada_loss", "teacher_dropping", "ema", "spectral", "drop_path", "lamb", "muon")


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return distill(tiny_config(tmp_path_factory.mktemp("plain"), steps=3)).out


@pytest.mark.parametrize("name", OPTIONS)
def test_an_option_changes_what_it_should_and_resumes_exactly(
    name: str, plain: Path, tmp_path: Path
) -> None:
    whole = with_options(tiny_config(tmp_path / "whole", steps=3), **OPTIONS[name])
    distill(whole)
    if name in CARRIED:
        config = with_options(tiny_config(tmp_path, steps=3), **OPTIONS[name])
        config.checkpoint.every_steps = 1
        with pytest.raises(Killed), DyingStream(config, at=2) as stream:
            distill(config, stream)
        distill(config)
        assert losses_of(config.out) == losses_of(whole.out)
        assert rows_of(config.out) == rows_of(whole.out)
    same_start = losses_of(whole.out)[0] == losses_of(plain)[0]
    same_end = losses_of(whole.out)[2] == losses_of(plain)[2]
    if name == "ema":  # the student learns as it did; another is measured
        assert same_start and same_end and rows_of(whole.out)[1] != rows_of(plain)[1]
    elif name == "checkpointing":  # the same numbers, computed twice
        assert same_start and same_end and rows_of(whole.out) == rows_of(plain)
    elif name in (
        *BALANCES,
        "lamb",
        "muon",
    ):  # the first losses are the same, what is made of them is not
        assert same_start and not same_end
    else:
        assert not same_start and not same_end


def test_the_average_is_what_is_evaluated_and_fused(tmp_path: Path) -> None:
    config = with_options(tiny_config(tmp_path, steps=3), optimizer__ema_decay=0.9)
    out = distill(config).out
    checkpoint = find_checkpoint(out)
    key = "backbone.blocks.3.attn.qkv.weight"
    assert not torch.equal(checkpoint.tensors["ema"][key], checkpoint.tensors["model"][key])
    fused = weights_of(checkpoint).backbone["blocks.3.attn.qkv.weight"]
    assert torch.equal(fused, checkpoint.tensors["ema"][key])
    assert evaluate(out)["details"]["rows"] == rows_of(out)[-1]["held_out"]


def test_an_average_follows_a_refit(tmp_path: Path) -> None:
    """At the first step of a stage the average still says the same in the teacher's space."""
    config = with_options(two_stages(tmp_path), optimizer__ema_decay=0.5)
    config.checkpoint.every_steps, config.checkpoint.keep = 1, 9
    out = distill(config).out
    before, after = (
        find_checkpoint(out / "checkpoints" / f"step-{n:06d}").standardizers["words"]
        for n in (3, 4)
    )
    assert not torch.equal(before.matrix, after.matrix)
    key = "adaptors.words.features.final.2.weight"
    old, new = (
        find_checkpoint(out / "checkpoints" / f"step-{n:06d}").tensors["ema"][key].double()
        for n in (3, 4)
    )
    moved = (after.inverse @ new - before.inverse @ old).norm() / (before.inverse @ old).norm()
    stayed = (new - old).norm() / old.norm()
    assert moved < 0.1 < stayed, "one step of learning, not another space"


def test_unknown_balances_and_options_are_named(tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    config.losses.balance = "luck"
    with pytest.raises(RadioError, match="'luck'; known: fixed, ada_loss, teacher_dropping"):
        build_balance(config)
    config.losses.balance, config.losses.balance_options = "ada_loss", {"momentun": 0.9}
    with pytest.raises(RadioError, match=r"balance_options do not fit 'ada_loss'.*momentun"):
        build_balance(config)


def test_a_window_trains_and_is_refused_where_it_cannot_be(tmp_path: Path, plain: Path) -> None:
    config = tiny_config(tmp_path, steps=2)
    config.student.num_global = 1  # of four blocks; four of four would leave no window
    high = config.stages[0].partitions["high"]
    high.window = 2
    with pytest.raises(RadioError, match=r"high\.window goes with no token merging"):
        check(config)
    high.merge_per_block = 0
    check(config)
    losses = losses_of(distill(config).out)
    high.window, config.out = None, str(tmp_path / "global")
    assert losses != losses_of(distill(config).out)
    high.window = 3
    with pytest.raises(
        RadioError, match="64 px are 4 tokens along a side; windows that fit: 1, 2, 4"
    ):
        check(config)


def test_a_spectral_student_survives_a_refit(tmp_path: Path) -> None:
    config = with_options(two_stages(tmp_path), student__spectral=True)
    config.stages[1].lr = 1e-12  # nothing is learnt: only the space changes
    config.checkpoint.every_steps, config.checkpoint.keep = 1, 9
    out = distill(config).out
    heads = [
        weights_of(find_checkpoint(out / "checkpoints" / f"step-{step:06d}"))
        .teachers["words"]
        .states["features"]["final.2.weight"]
        for step in (3, 4)
    ]
    # One power iteration a step moves the norm's estimate a little.
    assert (heads[1] - heads[0]).norm() / heads[0].norm() < 0.05
