"""Balances against float64 loops, and their exact resume."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from radio.training.balance import (
    BALANCES,
    AdaLoss,
    Balance,
    Fixed,
    TeacherDropping,
    keep_teachers,
)

SEEDS = st.integers(0, 2**32)
NAMES = ("clip/summary", "clip/features", "sam/features")


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def uniform(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=seeded(seed)) + 0.01


def losses_of(balance: Balance, step: int) -> dict[str, Tensor]:
    """Return a step's losses, of quite different sizes, in the shape that a balance looks at."""
    shape = (5,) if balance.per_view else ()
    sizes = (1.0, 30.0, 0.05)
    return {
        name: size * uniform(*shape, seed=10 * step + at)
        for at, (name, size) in enumerate(zip(NAMES, sizes, strict=True))
    }


# What all promise


@pytest.mark.parametrize("name", BALANCES)
def test_weights_have_the_losses_shape_and_mean_1_and_no_gradient(name: str) -> None:
    balance = BALANCES[name]()
    for step in range(5):
        losses = {n: loss.requires_grad_() for n, loss in losses_of(balance, step).items()}
        weights = balance.weights(losses, seeded(step))
        assert weights.keys() == losses.keys()
        for n, weight in weights.items():
            assert weight.shape == losses[n].shape
            assert not weight.requires_grad
            assert (weight >= 0).all()
        if not balance.per_view:
            mean = torch.stack(list(weights.values())).mean()
            torch.testing.assert_close(mean, torch.tensor(1.0))
        sum((weights[n] * losses[n]).sum() for n in losses).backward()
        for n in losses:
            assert torch.equal(losses[n].grad, weights[n])


@pytest.mark.parametrize("name", BALANCES)
def test_a_resumed_balance_goes_on_bit_for_bit(name: str) -> None:
    whole, first, second = BALANCES[name](), BALANCES[name](), BALANCES[name]()
    for step in range(20):
        running = first if step < 8 else second
        if step == 8:
            second.load_state_dict({key: t.clone() for key, t in first.state_dict().items()})
        expected = whole.weights(losses_of(whole, step), seeded(step))
        found = running.weights(losses_of(whole, step), seeded(step))
        assert all(torch.equal(found[n], expected[n]) for n in NAMES)
    state, expected_state = second.state_dict(), whole.state_dict()
    assert state.keys() == expected_state.keys()
    assert all(torch.equal(state[key], expected_state[key]) for key in state)
    assert all(isinstance(value, Tensor) for value in state.values())


@pytest.mark.parametrize("name", BALANCES)
def test_narrow_losses_have_wide_weights(name: str) -> None:
    exact, narrow = BALANCES[name](), BALANCES[name]()
    losses = losses_of(exact, 0)
    expected = exact.weights(losses, seeded())
    with torch.autocast("cpu", torch.bfloat16):
        found = narrow.weights({n: loss.bfloat16() for n, loss in losses.items()}, seeded())
    for n in NAMES:
        assert found[n].dtype == torch.float32
        torch.testing.assert_close(found[n], expected[n], rtol=1e-2, atol=0)


@pytest.mark.parametrize("name", BALANCES)
def test_the_global_generator_is_left_alone(name: str) -> None:
    balance = BALANCES[name]()
    before = torch.get_rng_state()
    balance.weights(losses_of(balance, 0), seeded())
    assert torch.equal(torch.get_rng_state(), before)


def test_no_state_is_taken_where_there_is_none() -> None:
    for balance in (Fixed(), TeacherDropping()):
        assert balance.state_dict() == {}
        balance.load_state_dict({})
        with pytest.raises(ValueError, match="no state"):
            balance.load_state_dict({"clip/features|mean": torch.ones(())})


def test_fixed_weighs_nothing() -> None:
    assert Fixed().weights({"a/x": torch.tensor(3.0)}, seeded()) == {"a/x": torch.tensor(1.0)}


# AdaLoss


@settings(deadline=None, max_examples=30)
@given(
    steps=st.lists(st.tuples(*[st.floats(1 / 64, 100, width=32)] * 3), min_size=1, max_size=20),
    momentum=st.sampled_from([0.0, 0.5, 0.9, 0.99]),
)
def test_ada_loss_follows_its_oracle(
    steps: list[tuple[float, float, float]], momentum: float
) -> None:
    balance = AdaLoss(momentum)
    means = np.zeros(3)
    for at, values in enumerate(steps, start=1):
        found = balance.weights(
            {name: torch.tensor(value) for name, value in zip(NAMES, values, strict=True)},
            seeded(),
        )
        means = momentum * means + (1 - momentum) * np.array(values)
        inverse = 1 / (means / (1 - momentum**at))
        expected = inverse / inverse.mean()
        np.testing.assert_allclose([found[n].item() for n in NAMES], expected, rtol=1e-5)


def test_ada_loss_makes_all_losses_equal_from_the_first_step_on() -> None:
    balance = AdaLoss()
    values = {"a/x": torch.tensor(1.0), "b/x": torch.tensor(250.0), "c/x": torch.tensor(0.004)}
    for _ in range(3):
        weights = balance.weights(values, seeded())
        weighted = torch.stack([weights[name] * values[name] for name in values])
        torch.testing.assert_close(weighted, weighted[0].expand(3))


def test_ada_loss_takes_views_by_their_mean() -> None:
    views, means = AdaLoss(), AdaLoss()
    for step in range(3):
        losses = {name: uniform(7, seed=3 * step + at) for at, name in enumerate(NAMES)}
        found = views.weights(losses, seeded())
        expected = means.weights({name: loss.mean() for name, loss in losses.items()}, seeded())
        assert all(torch.equal(found[n], expected[n].expand(7)) for n in NAMES)


def test_a_loss_that_joins_later_starts_its_own_mean() -> None:
    balance = AdaLoss(0.9)
    for _ in range(50):
        balance.weights({"a/x": torch.tensor(2.0)}, seeded())
    weights = balance.weights({"a/x": torch.tensor(2.0), "b/x": torch.tensor(8.0)}, seeded())
    torch.testing.assert_close(weights["a/x"], torch.tensor(1.6))
    torch.testing.assert_close(weights["b/x"], torch.tensor(0.4))
    assert balance.state_dict()["b/x|count"] == 1


def test_ada_loss_bears_a_loss_that_reached_zero_and_shows_a_nan() -> None:
    zero = AdaLoss().weights({"a/x": torch.tensor(0.0), "b/x": torch.tensor(1.0)}, seeded())
    assert all(torch.isfinite(weight) for weight in zero.values())
    nan = AdaLoss().weights({"a/x": torch.tensor(float("nan")), "b/x": torch.tensor(1.0)}, seeded())
    assert nan["a/x"].isnan()


@pytest.mark.parametrize("momentum", [-0.1, 1.0])
def test_a_momentum_that_forgets_nothing_is_refused(momentum: float) -> None:
    with pytest.raises(ValueError, match="momentum"):
        AdaLoss(momentum)


# Teacher dropping


@settings(deadline=None, max_examples=40)
@given(seed=SEEDS, teachers=st.integers(1, 5), b=st.integers(1, 6), probability=st.floats(0, 1))
def test_kept_teachers_follow_their_oracle(
    seed: int, teachers: int, b: int, probability: float
) -> None:
    losses = uniform(teachers, b, seed=seed)
    draws = torch.rand(teachers, b, generator=seeded(seed + 1))
    expected = np.zeros((teachers, b))
    for view in range(b):
        largest = int(np.argmax(losses[:, view].numpy()))
        for teacher in range(teachers):
            dropped = draws[teacher, view].item() < probability
            expected[teacher, view] = teacher == largest or not dropped
    found = keep_teachers(losses, probability, seeded(seed + 1))
    np.testing.assert_allclose(found, expected / expected.mean(), rtol=1e-6)
    assert torch.equal(found, keep_teachers(losses, probability, seeded(seed + 1)))
    # UNIC divides by the sum of all coefficients instead
    unic = (expected / expected.sum() * losses.double().numpy()).sum()
    np.testing.assert_allclose((found * losses).mean(1).sum(), teachers * unic, rtol=1e-5)


def test_dropping_never_or_always() -> None:
    losses = uniform(4, 50)
    assert torch.equal(keep_teachers(losses, 0.0, seeded()), torch.ones(4, 50))
    always = keep_teachers(losses, 1.0, seeded())
    assert torch.equal(always > 0, losses == losses.amax(0))
    assert (always[always > 0] == 4).all()


def test_all_but_the_largest_are_dropped_equally_often_and_apart() -> None:
    losses = torch.tensor([[1.0], [5.0], [2.0]]).expand(3, 20_000)
    kept = keep_teachers(losses, 0.3, seeded()) > 0
    assert kept[1].all()
    for teacher in (0, 2):
        assert abs(kept[teacher].float().mean() - 0.7) < 0.015
    assert abs(np.corrcoef(kept[[0, 2]].numpy())[0, 1]) < 0.03


def test_a_teacher_is_dropped_as_a_whole_by_the_sum_of_its_losses() -> None:
    losses = {
        "clip/summary": torch.tensor([3.0, 0.0]),
        "sam/features": torch.tensor([4.0, 4.0]),
        "clip/features": torch.tensor([3.0, 1.0]),
    }
    weights = TeacherDropping(1.0).weights(losses, seeded())
    assert weights["clip/summary"].tolist() == [2, 0]
    assert weights["clip/features"].tolist() == [2, 0]
    assert weights["sam/features"].tolist() == [0, 2]


@settings(deadline=None, max_examples=20)
@given(seed=SEEDS, scale=st.floats(1e-3, 1e3))
def test_dropping_knows_no_common_scale(seed: int, scale: float) -> None:
    losses = uniform(3, 6, seed=seed)
    expected = keep_teachers(losses, 0.5, seeded(seed))
    assert torch.equal(keep_teachers(scale * losses, 0.5, seeded(seed)), expected)


def test_a_nan_is_never_dropped() -> None:
    losses = {"a/x": torch.tensor([float("nan"), 1.0]), "b/x": torch.tensor([9.0, 2.0])}
    weights = TeacherDropping(1.0).weights(losses, seeded())
    assert weights["a/x"].tolist() == [2, 0]


@pytest.mark.parametrize("probability", [-0.1, 1.1])
def test_what_is_no_probability_is_refused(probability: float) -> None:
    with pytest.raises(ValueError, match="probability"):
        TeacherDropping(probability)
