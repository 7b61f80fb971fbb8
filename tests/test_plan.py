from __future__ import annotations

import itertools
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from radio.data.plan import PartitionPlan, Plan, StagePlan, permute, seed_for
from radio.errors import RadioError

STAGES = [
    StagePlan(
        30,
        (
            PartitionPlan("low", 32, 3, {"a": "native"}),
            PartitionPlan("high", 64, 1, {"a": "native"}),
        ),
    ),
    StagePlan(5, (PartitionPlan("only", 32, 2, {"a": "native"}),)),
]


@settings(max_examples=30, deadline=None)
@given(size=st.integers(1, 400), seed=st.integers(0, 2**62))
def test_permute_is_a_permutation(size: int, seed: int) -> None:
    assert sorted(permute(at, size, seed) for at in range(size)) == list(range(size))


def test_permute_mixes() -> None:
    order = [permute(at, 1000, 5) for at in range(1000)]
    assert sum(abs(a - b) == 1 for a, b in itertools.pairwise(order)) < 20
    assert order != [permute(at, 1000, 6) for at in range(1000)]


def test_seeds_differ_by_purpose_and_key() -> None:
    seeds = {seed_for(0, "a"), seed_for(0, "b"), seed_for(1, "a"), seed_for(0, "a", 1)}
    seeds |= {seed_for(0, "a", 1, 2), seed_for(0, "a", 12)}
    assert len(seeds) == 6
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_a_step_depends_on_nothing_but_its_number() -> None:
    one, other = Plan(3, 21, STAGES), Plan(3, 21, STAGES)
    forwards = [one(step) for step in range(one.num_steps)]
    backwards = [other(step) for step in reversed(range(other.num_steps))]
    assert forwards == backwards[::-1]


def test_an_epoch_sees_every_sample_once_and_leaves_its_tail() -> None:
    plan = Plan(0, 21, STAGES)
    seen = Counter(
        view.sample for step in range(5) for part in plan(step).partitions for view in part.views
    )
    assert len(seen) == 20 and set(seen.values()) == {1}
    assert {view.epoch for part in plan(5).partitions for view in part.views} == {1}


def test_repeat_epochs_repeats_views_partitions_and_order() -> None:
    plan = Plan(0, 21, STAGES, repeat_epochs=2)
    assert plan(0).partitions == plan(10).partitions
    assert plan(0).partitions != plan(5).partitions
    never = Plan(0, 21, STAGES, repeat_epochs=0)
    assert never(0).partitions != never(10).partitions


def test_stages_follow_each_other() -> None:
    plan = Plan(0, 21, STAGES)
    assert (plan(29).stage, plan(29).stage_step) == (0, 29)
    assert (plan(30).stage, plan(30).stage_step) == (1, 0)
    assert plan.num_steps == 35
    with pytest.raises(IndexError):
        plan(35)


def test_too_few_pictures_are_refused_with_both_numbers() -> None:
    with pytest.raises(RadioError, match=r"4 views per step.*only 3 pictures"):
        Plan(0, 3, STAGES)


def test_held_out_visits_every_view_once_per_resolution() -> None:
    plan = Plan(0, 21, STAGES[:1])
    parts = plan.held_out(7, batch=3, teachers={"a"})
    for size in (32, 64):
        samples = [view.sample for part in parts if part.image_size == size for view in part.views]
        assert samples == list(range(7))
