"""A step in several real processes (gloo) is the step of one process with all views."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from one_of_several import shared_config, train
from safetensors.torch import load_file
from test_distill import losses_of, rows_of
from tiny import tiny_config, write_pictures

from radio.checks import check
from radio.data.configured import training_plan
from radio.data.plan import PartitionPlan, Plan, StagePlan
from radio.data.ranks import Ranks, micro_shards
from radio.errors import RadioError
from radio.targets.stream import LocalStream
from radio.targets.target_maker import Request
from radio.training.distill import distill

TESTS = Path(__file__).parent


def run(root: Path, name: str, processes: int, **options: Any) -> tuple[Path, Path]:
    """Run a tiny run in so many processes; return its folder and its first gradients.

    One is this one: each start of Python takes longer than the run.
    """
    out, gradients = root / name, root / f"{name}.safetensors"
    options["out"] = str(out)
    if processes == 1:
        train(root, gradients, options)
        return out, gradients
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    start += [f"--nproc-per-node={processes}"]
    arguments = [str(TESTS / "one_of_several.py"), str(root), str(gradients), json.dumps(options)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        start + arguments, env=environment, capture_output=True, text=True, timeout=300, cwd=root
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return out, gradients


def assert_equal(one: tuple[Path, Path], several: tuple[Path, Path]) -> None:
    """Gradients agree to 1e-6 of their size, losses and held-out rows to rounding."""
    expected, found = load_file(one[1]), load_file(several[1])
    assert expected.keys() == found.keys() and len(expected) > 50
    scale = torch.cat([each.flatten() for each in expected.values()]).norm()
    differences = torch.cat([(found[k] - expected[k]).flatten() for k in expected]).norm()
    assert differences < 1e-6 * scale
    for here, there in zip(losses_of(one[0]), losses_of(several[0]), strict=True):
        assert there == pytest.approx(here, rel=1e-5)
    for row, other in zip(rows_of(one[0]), rows_of(several[0]), strict=True):
        assert row["step"] == other["step"]
        pairs = zip(row["held_out"], other["held_out"], strict=True)  # type: ignore[call-overload]
        assert all(a["fidelity"] == pytest.approx(b["fidelity"], rel=1e-4) for a, b in pairs)


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, tuple[Path, Path]]:
    """A process alone, with all views of a step."""
    root = tmp_path_factory.mktemp("ranks")
    write_pictures(root / "train", 24)
    write_pictures(root / "val", 4, seed=1)
    return root, run(root, "one", 1)


def test_partitions_on_two_ranks_have_the_gradients_of_one_process(
    one: tuple[Path, tuple[Path, Path]],
) -> None:
    root, alone = one
    options = {"parallel.kind": "ddp", "parallel.placement": "by_rank"}
    assert_equal(alone, run(root, "by_two_ranks", 2, **options))


@pytest.mark.slow
@pytest.mark.parametrize("placement", ["together", "by_rank"])
def test_four_ranks_have_the_gradients_of_one_process(
    placement: str, one: tuple[Path, tuple[Path, Path]]
) -> None:
    root, alone = one
    options = {"parallel.kind": "ddp", "parallel.placement": placement}
    assert_equal(alone, run(root, f"four_{placement}", 4, **options))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_ranks_are_one_process_and_each_resumes_the_other(
    kind: str, one: tuple[Path, tuple[Path, Path]]
) -> None:
    root, alone = one
    options = {"parallel.kind": kind, "optimizer.name": "adamw", "checkpoint.every_steps": 1}
    expected = run(root, f"adamw_{kind}", 1, **{**options, "parallel.kind": None})
    assert_equal(expected, run(root, f"two_{kind}", 2, **options))
    assert_equal(alone, run(root, f"plain_{kind}", 2, **{"parallel.kind": kind}))
    out = root / f"two_{kind}"
    for path in (out / "checkpoints").glob("step-000002*"):
        path.rename(root / f"{kind}-{path.name}")
    resumed, _ = run(root, f"two_{kind}", 1, **{**options, "parallel.kind": None})
    for here, there in zip(losses_of(expected[0]), losses_of(resumed), strict=True):
        assert there == pytest.approx(here, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("ddp", {"student.spectral": True, "student.drop_path": 0.3}),
        ("fsdp", {"student.damp": 0.1, "two_stages": True}),
    ],
)
def test_what_a_step_carries_is_the_same_in_two_processes(
    kind: str, options: dict[str, Any], one: tuple[Path, tuple[Path, Path]]
) -> None:
    root, _ = one
    alone = run(root, f"carried_{kind}_1", 1, **options)
    assert_equal(alone, run(root, f"carried_{kind}_2", 2, **{**options, "parallel.kind": kind}))


# Who takes what


@settings(deadline=None, max_examples=40)
@given(size=st.integers(1, 6), placement=st.sampled_from(["together", "by_rank"]))
def test_every_micro_shard_has_one_process(size: int, placement: str) -> None:
    parts = [PartitionPlan(*each, {}, micro_shard=2) for each in (("low", 32, 8), ("high", 64, 4))]
    plan = Plan(0, 24, [StagePlan(2, tuple(parts))])
    spec, stage = plan(1), plan.stages[0]
    if placement == "by_rank" and size < 2:
        return
    taken = [Ranks(rank, size, placement).share(spec, stage) for rank in range(size)]
    for number, partition in enumerate(spec.partitions):
        here = [p for each in taken for p in each.partitions if p.name == partition.name]
        shards = sorted(shard for part in here for shard in part.shards)
        assert shards == list(range(len(partition.shards)))
        found = {(s.shards[0], s.views, s.order) for part in here for s in micro_shards(part)}
        assert found == {(s.shards[0], s.views, s.order) for s in micro_shards(partition)}, number
    if placement == "by_rank" and size > 1:
        assert all(len(each.partitions) <= 1 for each in taken)


def test_targets_of_a_share_are_bits_of_the_whole(tmp_path: Path) -> None:
    """No forward of a teacher, and no canvas, mixes views of two micro-shards."""
    config = shared_config(tmp_path, {})
    plan = training_plan(config, 24)
    spec, stage = plan(0), plan.stages[0]
    request = Request("train", "float32", {})
    with LocalStream(config) as stream:
        whole = next(iter(stream.read([spec], request)))
        for rank in range(2):
            share = Ranks(rank, 2).share(spec, stage)
            part = next(iter(stream.read([share], request)))
            for all_of, some in zip(whole.partitions, part.partitions, strict=True):
                rows = [row for shard in some.shards for row in (2 * shard, 2 * shard + 1)]
                assert torch.equal(all_of.images[rows], some.images)
                for name, target in some.targets.items():
                    assert torch.equal(all_of.targets[name].features[rows], target.features)


def test_one_micro_shard_is_the_whole_batch(tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    plain = training_plan(config, 24)(3).partitions
    assert [part.shards for part in plain] == [(0,), (0,)]
    config.parallel.micro_shard = 1
    finest = training_plan(config, 24)(3).partitions
    assert [part.views for part in plain] == [part.views for part in finest]
    assert finest[0].order == (0,) * 5


# Bad input


def test_what_processes_cannot_share_is_refused(tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    config.parallel.micro_shard = 2
    with pytest.raises(RadioError, match=r"micro_shard is 2.*low\.batch, 5"):
        check(config)
    config.parallel.micro_shard = None
    config.parallel.placement = "by_rank"
    with pytest.raises(RadioError, match=r"placement=by_rank needs several.*parallel\.kind"):
        check(config)
    config.parallel.kind = "ddp"
    config.losses.balance = "teacher_dropping"
    with pytest.raises(RadioError, match=r"kind=ddp does not go with losses\.balance"):
        check(config)
    config.losses.balance = "fixed"
    with pytest.raises(RadioError, match="torchrun --nproc-per-node 2"):
        distill(config)
    plan = training_plan(config, 24)
    with pytest.raises(RadioError, match=r"2 micro-shards for 3 processes.*micro_shard"):
        Ranks(0, 3, "by_rank").check(plan)
    one_partition = replace(plan.stages[0], partitions=plan.stages[0].partitions[:1])
    plan.stages = (one_partition,)
    with pytest.raises(RadioError, match="1 micro-shards for 2 processes"):
        Ranks(0, 2).check(plan)


def test_processes_without_a_kind_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RadioError, match=r"2 processes were started.*parallel\.kind=ddp"):
        distill(tiny_config(tmp_path))
