"""Stages: their own schedule, frozen trunk, drawn resolutions, and standardizers fitted again."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_distill import DyingStream, Killed, losses_of
from tiny import tiny_config
from torch import nn

from radio.config import Config, PartitionConfig, StageConfig, check
from radio.data.configured import training_plan
from radio.data.plan import PartitionPlan, Plan, StagePlan
from radio.encoder.fuse import fuse, weights_of
from radio.errors import RadioError
from radio.targets.standardize import PerChannel, PhiS, load_standardizers
from radio.training.checkpoint import find_checkpoint, load_checkpoint
from radio.training.distill import distill
from radio.training.optim import learning_rate
from radio.training.refit import refit_adaptor

pytestmark = pytest.mark.usefixtures("no_report")


def two_stages(root: Path, refit: bool = True) -> Config:
    """Three steps without `edges`, then three with it, at other resolutions and another rate."""
    config = tiny_config(root, steps=3)
    (first,) = config.stages
    second = StageConfig(
        3,
        {
            "low": PartitionConfig(
                48, 4, {"words": "native", "parts": "match", "edges": "native"}, 0, [32, 48, 64]
            )
        },
        lr=3e-4,
        frozen_trunk_steps=1,
        refit=refit,
    )
    for partition in first.partitions.values():
        del partition.views["edges"]
    config.stages = [first, second]
    return config


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return distill(two_stages(tmp_path_factory.mktemp("stages"))).out


def test_a_refit_changes_no_prediction_in_the_teachers_space() -> None:
    generator = torch.Generator().manual_seed(0)
    old = torch.randn(500, 12, generator=generator, dtype=torch.float64) * 3 + 5
    new = torch.randn(500, 12, generator=generator, dtype=torch.float64) * 0.5 - 2
    last = nn.Linear(20, 12)
    optimizer = torch.optim.AdamW([*last.parameters(), other := nn.Parameter(torch.ones(3))])
    (last(torch.ones(1, 20)).sum() + other.sum()).backward()
    optimizer.step()
    tokens = torch.randn(50, 20, generator=generator)
    last.requires_grad_(False)
    for before, after in [
        (PhiS(12, "a").partial_fit(old).fit(), PhiS(12, "a").partial_fit(new).fit()),
        (PhiS(12, "a").partial_fit(new).fit(), PerChannel(12, "a").partial_fit(old).fit()),
    ]:
        said = before.inverse_transform(last(tokens).double())
        refit_adaptor(last, before, after, optimizer)
        says = after.inverse_transform(last(tokens).double())
        assert float((says - said).abs().max() / said.abs().max()) < 1e-6
    assert set(optimizer.state) == {other}, "moments of the old space are dropped, others kept"


def test_the_second_stage_has_its_own_standardizers(run: Path) -> None:
    folder = run / "standardizers"
    assert sorted(path.name for path in folder.glob("*.safetensors")) == [
        "parts.safetensors", "words.safetensors",
    ]  # fmt: skip
    assert len(list((folder / "stage-1").iterdir())) == 3
    first = load_checkpoint(run / "checkpoints" / "step-000002").standardizers
    last = find_checkpoint(run).standardizers
    assert set(first) == {"words", "parts"} and set(last) == {"words", "parts", "edges"}
    assert not torch.equal(first["words"].mean, last["words"].mean)
    saved = load_standardizers(folder / "stage-1" / "words.safetensors")["words"]
    assert torch.equal(saved.matrix, last["words"].matrix)


@pytest.mark.parametrize("at", [1, 2, 3, 4])  # in a stage, before its end, at a start, after it
def test_killed_in_any_stage_and_resumed_gives_the_same_bits(
    at: int, run: Path, tmp_path: Path
) -> None:
    config = two_stages(tmp_path)
    config.checkpoint.every_steps = 1
    with pytest.raises(Killed), DyingStream(config, at) as stream:
        distill(config, stream)
    distill(config)
    assert losses_of(config.out) == losses_of(run)


def test_an_encoder_of_the_first_stage_leaves_out_the_untrained_head(
    run: Path, tmp_path: Path
) -> None:
    early = run / "checkpoints" / "step-000002"
    weights = weights_of(load_checkpoint(early))
    assert weights.teachers["edges"].states == {}
    assert "no stage before step 2" in weights.teachers["edges"].left_out["features"]
    fuse(early, tmp_path / "early")
    assert "left out" in (tmp_path / "early" / "README.md").read_text()


def test_only_the_adaptors_move_while_the_trunk_is_frozen(run: Path, tmp_path: Path) -> None:
    config = two_stages(tmp_path)
    config.checkpoint.every_steps, config.checkpoint.keep = 1, 9
    out = distill(config).out
    at = [load_checkpoint(out / "checkpoints" / f"step-{n:06d}").model for n in (3, 4, 5)]
    moved = [{k for k in at[0] if not torch.equal(a[k], b[k])} for a, b in itertools.pairwise(at)]
    assert moved[0] and not any(key.startswith("backbone.") for key in moved[0])
    assert any(key.startswith("backbone.blocks.") for key in moved[1])


def test_a_new_teacher_without_a_refit_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RadioError, match=r"stages\[1\].*edges.*stages\[1\]\.refit=true"):
        check(two_stages(tmp_path, refit=False))


def test_every_step_draws_a_resolution_and_the_same_one_each_time() -> None:
    part = PartitionPlan("low", 48, 2, {"a": "native"}, 0, (32, 48, 64))
    plan = Plan(1, 40, [StagePlan(300, (part,))])
    sizes = [plan(step).partitions[0].image_size for step in range(300)]
    assert sizes == [plan(step).partitions[0].image_size for step in range(300)]
    counts = Counter(sizes)
    assert set(counts) == {32, 48, 64} and min(counts.values()) > 70
    assert {spec.image_size for spec in plan.held_out(4, 2, {"a"})} == {48}
    again = replace(part, name="other")
    others = Plan(1, 40, [StagePlan(300, (again,))])
    assert sizes != [others(step).partitions[0].image_size for step in range(300)]
    cached = Plan(1, 40, [StagePlan(300, (part,))], repeat_epochs=2)
    assert [cached(s).partitions for s in range(40)] == [
        cached(s + 40).partitions for s in range(40)
    ]


def test_steps_of_a_stage(tmp_path: Path) -> None:
    plan = training_plan(two_stages(tmp_path), 24)
    assert (plan.steps_of(0), plan.steps_of(1)) == (range(0, 3), range(3, 6))
    assert all(plan.locate(step)[0] == stage for stage in (0, 1) for step in plan.steps_of(stage))


def test_the_rate_warms_up_and_falls_to_zero_in_every_stage() -> None:
    rates = [learning_rate(2.0, 3, step, 13) for step in range(13)]
    assert rates[:4] == [0.5, 1.0, 1.5, 2.0]
    assert rates[8] == pytest.approx(1.0)  # half way of the cosine
    assert all(later < earlier for earlier, later in itertools.pairwise(rates[3:]))
    assert rates[-1] == pytest.approx(1 + torch.cos(torch.tensor(torch.pi * 0.9)).item())
