"""Losses against float64 NumPy oracles, and the properties they promise."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from radio.targets.angles import angle_between, angle_dispersion
from radio.training.losses import (
    FEATURE_LOSSES,
    RIGHT_ANGLE,
    SUMMARY_LOSSES,
    angle_loss,
    cosine_loss,
    cosine_map_loss,
    hybrid_loss,
    mse_loss,
    smooth_l1_loss,
    token_similarity_loss,
    weighted_sum,
)

Array = np.ndarray
SEEDS = st.integers(0, 2**32)
SIZES = st.tuples(*[st.integers(1, 5)] * 4)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def maps(sizes: tuple[int, ...], seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return predicted, target [b, c, h, w], and about two thirds of [b, h, w] valid."""
    b, _, h, w = sizes
    valid = normal(b, h, w, seed=seed + 2) > -0.4
    return 2 * normal(*sizes, seed=seed), normal(*sizes, seed=seed + 1), valid


# Oracles: one view or position at a time, float64


def cosine_of(x: Array, y: Array) -> float:
    return float(x @ y / (np.linalg.norm(x) * np.linalg.norm(y)))


def angle_of(x: Array, y: Array) -> float:
    return math.acos(max(-1.0, min(1.0, cosine_of(x, y))))


def mse_of(x: Array, y: Array) -> float:
    return float(((x - y) ** 2).mean())


def smooth_l1_of(x: Array, y: Array) -> float:
    d = np.abs(x - y)
    return float(np.where(d < 1, d * d / 2, d - 0.5).mean())


SUMMARY_ORACLES: dict[str, Callable[[Array, Array], float]] = {
    "cosine": lambda x, y: 1 - cosine_of(x, y),
    "angle": lambda x, y: angle_of(x, y) ** 2 / (math.pi**2 / 4),
}


def mean_of(position: Callable[[Array, Array], float]) -> Callable[[Array, Array], float]:
    return lambda x, y: float(np.mean([position(p, t) for p, t in zip(x, y, strict=True)]))


def token_similarity_of(x: Array, y: Array) -> float:
    pairs = [(i, j) for i in range(len(x)) for j in range(len(x))]
    return float(np.mean([(cosine_of(x[i], x[j]) - cosine_of(y[i], y[j])) ** 2 for i, j in pairs]))


# What a view costs, from the features [positions, channels] at its valid positions
VIEW_ORACLES: dict[str, Callable[[Array, Array], float]] = {
    "mse": mean_of(mse_of),
    "smooth_l1": mean_of(smooth_l1_of),
    "cosine": mean_of(lambda x, y: 1 - cosine_of(x, y)),
    "hybrid": mean_of(lambda x, y: 0.9 * (1 - cosine_of(x, y)) + 0.1 * smooth_l1_of(x, y)),
    "token_similarity": token_similarity_of,
}


def features_oracle(
    view_oracle: Callable[[Array, Array], float], predicted: Tensor, target: Tensor, valid: Tensor
) -> list[float]:
    x, y = (maps.double().permute(0, 2, 3, 1).numpy() for maps in (predicted, target))
    return [
        view_oracle(x[view][keep], y[view][keep]) if keep.any() else 0.0
        for view, keep in enumerate(valid.numpy())
    ]


def test_every_row_has_an_oracle() -> None:
    assert SUMMARY_ORACLES.keys() == SUMMARY_LOSSES.keys()
    assert VIEW_ORACLES.keys() == FEATURE_LOSSES.keys()


@pytest.mark.parametrize("name", SUMMARY_LOSSES)
@settings(deadline=None, max_examples=30)
@given(b=st.integers(1, 6), c=st.integers(2, 40), seed=SEEDS)
def test_summary_losses_follow_their_oracles(name: str, b: int, c: int, seed: int) -> None:
    x, y = normal(b, c, seed=seed), normal(b, c, seed=seed + 1)
    oracle = SUMMARY_ORACLES[name]
    expected = [oracle(p, t) for p, t in zip(x.double().numpy(), y.double().numpy(), strict=True)]
    np.testing.assert_allclose(SUMMARY_LOSSES[name](x, y), expected, atol=2e-6)
    exact = SUMMARY_LOSSES[name](x.double(), y.double())
    assert exact.dtype == torch.float64
    np.testing.assert_allclose(exact, expected, atol=1e-12)


@pytest.mark.parametrize("name", FEATURE_LOSSES)
@settings(deadline=None, max_examples=30)
@given(sizes=SIZES, seed=SEEDS)
def test_feature_losses_follow_their_oracles(name: str, sizes: tuple[int, ...], seed: int) -> None:
    x, y, valid = maps(sizes, seed)
    expected = features_oracle(VIEW_ORACLES[name], x, y, valid)
    np.testing.assert_allclose(FEATURE_LOSSES[name](x, y, valid), expected, rtol=1e-5, atol=1e-5)
    exact = FEATURE_LOSSES[name](x.double(), y.double(), valid)
    np.testing.assert_allclose(exact, expected, rtol=1e-10, atol=1e-10)


def test_losses_agree_with_torch_where_all_is_valid() -> None:
    x, y = normal(3, 8, 4, 5), normal(3, 8, 4, 5, seed=1)
    valid = torch.ones(3, 4, 5, dtype=torch.bool)
    torch.testing.assert_close(mse_loss(x, y, valid).mean(), F.mse_loss(x, y))
    torch.testing.assert_close(smooth_l1_loss(x, y, valid).mean(), F.smooth_l1_loss(x, y))
    cosine = 1 - F.cosine_similarity(x, y, dim=1)
    torch.testing.assert_close(cosine_map_loss(x, y, valid).mean(), cosine.mean())
    together = 0.9 * cosine.mean() + 0.1 * F.smooth_l1_loss(x, y)
    torch.testing.assert_close(hybrid_loss(x, y, valid).mean(), together)
    torch.testing.assert_close(
        cosine_loss(x[..., 0, 0], y[..., 0, 0]),
        1 - F.cosine_similarity(x[..., 0, 0], y[..., 0, 0]),
    )


# Summary losses


@pytest.mark.parametrize("name", SUMMARY_LOSSES)
@settings(deadline=None, max_examples=30)
@given(
    seed=SEEDS,
    left=st.floats(1e-3, 1e3),
    right=st.floats(1e-3, 1e3),
    order=st.permutations(range(5)),
)
def test_summary_losses_know_no_scale_and_no_order(
    name: str, seed: int, left: float, right: float, order: list[int]
) -> None:
    loss = SUMMARY_LOSSES[name]
    x, y = normal(5, 16, seed=seed), normal(5, 16, seed=seed + 1)
    expected = loss(x, y)
    torch.testing.assert_close(loss(left * x, right * y), expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(loss(x[order], y[order]), expected[order])
    channels = torch.randperm(16, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(loss(x[:, channels], y[:, channels]), expected)
    torch.testing.assert_close(loss(y, x), expected)
    assert loss(x, 3 * x).abs().max() < 1e-6
    assert (loss(x, y) > 0).all()


def test_known_angles_have_known_losses() -> None:
    x = torch.tensor([[1.0, 0.0]] * 4)
    y = torch.tensor([[2.0, 0.0], [1.0, 1.0], [0.0, 5.0], [-3.0, 0.0]])
    angles = torch.tensor([0.0, math.pi / 4, math.pi / 2, math.pi])
    torch.testing.assert_close(angle_between(x, y), angles)
    torch.testing.assert_close(cosine_loss(x, y), 1 - angles.cos())
    torch.testing.assert_close(angle_loss(x, y), angles.square() / RIGHT_ANGLE)
    torch.testing.assert_close(angle_loss(x, y, 2.186), angles.square() / 2.186)
    torch.testing.assert_close(angle_loss(x, y, torch.tensor(0.694)), angles.square() / 0.694)


def test_small_angles_keep_their_digits() -> None:
    angles = torch.tensor([1e-2, 1e-3, 1e-4, 1e-5])
    x = torch.tensor([[1.0, 0.0]]).expand(4, 2)
    y = torch.stack([angles.cos(), angles.sin()], dim=1)
    torch.testing.assert_close(angle_between(x, y), angles, rtol=1e-4, atol=0)


@pytest.mark.parametrize("name", SUMMARY_LOSSES)
@pytest.mark.parametrize("kind", ["same", "opposite", "zero", "zero target"])
def test_gradients_are_finite_where_formulas_break(name: str, kind: str) -> None:
    y = normal(3, 8)
    x = {"same": y, "opposite": -y, "zero": 0 * y, "zero target": y}[kind].clone()
    x.requires_grad_()
    loss = SUMMARY_LOSSES[name](x, 0 * y if kind == "zero target" else y)
    loss.sum().backward()
    assert x.grad is not None
    assert torch.isfinite(loss).all()
    assert torch.isfinite(x.grad).all()
    if kind == "same":
        assert x.grad.abs().max() < 1e-5


@pytest.mark.parametrize("name", SUMMARY_LOSSES)
def test_summary_gradients_are_right(name: str) -> None:
    x = normal(4, 6).double().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda p: SUMMARY_LOSSES[name](p, normal(4, 6, seed=1).double()), x
    )


def test_dispersion_is_the_mean_squared_angle_to_the_mean() -> None:
    y = normal(200, 5) + torch.tensor([2.0, 0, 0, 0, 0])
    mean = y.double().numpy().mean(0)
    expected = np.mean([angle_of(row, mean) ** 2 for row in y.double().numpy()])
    np.testing.assert_allclose(angle_dispersion(y), expected, rtol=1e-5)
    np.testing.assert_allclose(angle_dispersion(7 * y), expected, rtol=1e-5)


def test_dispersion_of_a_cone_is_its_angle_squared() -> None:
    turns = torch.linspace(0, 2 * math.pi, 9)[:-1]
    opening = 0.3
    ring = torch.stack([turns.cos() * math.sin(opening), turns.sin() * math.sin(opening)], dim=1)
    cone = torch.cat([ring, torch.full((8, 1), math.cos(opening))], dim=1)
    torch.testing.assert_close(angle_dispersion(cone), torch.tensor(opening**2))
    # Predicting the cone's axis for each of its members costs 1 on average, whatever the teacher.
    axis = torch.tensor([[0.0, 0.0, 1.0]]).expand(8, 3)
    loss = angle_loss(axis, cone, angle_dispersion(cone))
    torch.testing.assert_close(loss.mean(), torch.tensor(1.0))


# Feature losses


@pytest.mark.parametrize("name", FEATURE_LOSSES)
@settings(deadline=None, max_examples=30)
@given(sizes=SIZES, seed=SEEDS)
def test_feature_losses_vanish_at_identity_and_know_no_order(
    name: str, sizes: tuple[int, ...], seed: int
) -> None:
    loss = FEATURE_LOSSES[name]
    x, y, valid = maps(sizes, seed)
    expected = loss(x, y, valid)
    assert loss(y, y, valid).abs().max() < 1e-6
    torch.testing.assert_close(loss(x.flip(0), y.flip(0), valid.flip(0)), expected.flip(0))
    torch.testing.assert_close(loss(x.flip(1), y.flip(1), valid), expected)
    torch.testing.assert_close(loss(x.flip(2, 3), y.flip(2, 3), valid.flip(1, 2)), expected)
    turned = (x.transpose(2, 3), y.transpose(2, 3), valid.transpose(1, 2))
    torch.testing.assert_close(loss(*turned), expected)


@pytest.mark.parametrize("name", FEATURE_LOSSES)
@pytest.mark.parametrize("junk", [0.0, 1e30, float("nan"), float("inf")])
def test_masked_positions_have_no_effect_and_no_gradient(name: str, junk: float) -> None:
    loss = FEATURE_LOSSES[name]
    x, y, valid = maps((3, 4, 5, 6), 0)
    valid[2] = False  # a view without any valid position
    outside = ~valid[:, None].expand_as(x)
    expected = loss(x, y, valid)
    spoilt_x = x.masked_fill(outside, junk).requires_grad_()
    spoilt_y = y.masked_fill(outside, -junk)
    found = loss(spoilt_x, spoilt_y, valid)
    assert torch.equal(found, expected)
    assert found[2] == 0
    found.sum().backward()
    assert spoilt_x.grad is not None
    assert (spoilt_x.grad[outside] == 0).all()
    assert (spoilt_x.grad[~outside] != 0).all()


@pytest.mark.parametrize("name", FEATURE_LOSSES)
def test_a_valid_nan_is_not_hidden(name: str) -> None:
    x, y, valid = maps((2, 4, 3, 3), 0)
    valid[0, 1, 1] = True
    x[0, 2, 1, 1] = float("nan")
    assert FEATURE_LOSSES[name](x, y, valid).isnan().tolist() == [True, False]


@pytest.mark.parametrize("name", FEATURE_LOSSES)
def test_feature_gradients_are_right(name: str) -> None:
    x, y, valid = maps((2, 3, 2, 3), 5)
    x = x.double().requires_grad_()
    assert torch.autograd.gradcheck(lambda p: FEATURE_LOSSES[name](p, y.double(), valid), x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_inputs_are_computed_in_float32(dtype: torch.dtype) -> None:
    x, y, valid = maps((2, 64, 8, 8), 1)
    x, y = x.to(dtype), y.to(dtype)
    for feature_loss in FEATURE_LOSSES.values():
        found = feature_loss(x, y, valid)
        assert found.dtype == torch.float32
        assert torch.equal(found, feature_loss(x.float(), y.float(), valid))
    for summary_loss in SUMMARY_LOSSES.values():
        found = summary_loss(x[..., 0, 0], y[..., 0, 0])
        assert found.dtype == torch.float32
        assert torch.equal(found, summary_loss(x[..., 0, 0].float(), y[..., 0, 0].float()))


@pytest.mark.parametrize("name", FEATURE_LOSSES)
def test_autocast_changes_no_loss(name: str) -> None:
    x, y, valid = maps((2, 64, 8, 8), 1)
    expected = FEATURE_LOSSES[name](x, y, valid)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(FEATURE_LOSSES[name](x, y, valid), expected)


# Token similarity


@settings(deadline=None, max_examples=30)
@given(seed=SEEDS, b=st.integers(1, 3), c=st.integers(2, 12), h=st.integers(1, 4))
def test_token_similarity_knows_neither_scales_nor_rotations(
    seed: int, b: int, c: int, h: int
) -> None:
    x, y, valid = maps((b, c, h, 3), seed)
    expected = token_similarity_loss(x, y, valid)
    scales = 0.1 + normal(b, 1, h, 3, seed=seed + 3).abs()
    torch.testing.assert_close(token_similarity_loss(scales * x, y, valid), expected)
    rotation = torch.linalg.qr(normal(c, c, seed=seed + 4).double())[0].float()
    turned = torch.einsum("dc,bchw->bdhw", rotation, x)
    torch.testing.assert_close(token_similarity_loss(turned, y, valid), expected)
    assert token_similarity_loss(turned, x, valid).max() < 1e-10


def test_known_relations_have_known_losses() -> None:
    x = torch.tensor([[1.0, 0.0], [0.0, 1.0]]).T.reshape(1, 2, 1, 2)  # two positions, orthogonal
    y = torch.tensor([[1.0, 0.0], [2.0, 0.0]]).T.reshape(1, 2, 1, 2)  # two of one direction
    both = torch.ones(1, 1, 2, dtype=torch.bool)
    # Of four pairs, the two of a position with itself agree and the two others differ by 1.
    torch.testing.assert_close(token_similarity_loss(x, y, both), torch.tensor([0.5]))


# Weighing views


def weighted_mean(losses: Tensor, counts: Tensor) -> Tensor:
    total, weight = weighted_sum(losses, counts)
    return total / weight.clamp_min(1e-30)


@settings(deadline=None)
@given(
    views=st.lists(st.tuples(st.floats(0, 100, width=32), st.integers(0, 4096)), min_size=1),
)
def test_views_weigh_the_root_of_their_valid_positions(views: list[tuple[float, int]]) -> None:
    losses, counts = (np.array(column, dtype=np.float64) for column in zip(*views, strict=True))
    total = np.sqrt(counts).sum()
    expected = (losses * np.sqrt(counts)).sum() / total if total else 0.0
    found = weighted_mean(torch.tensor(losses).float(), torch.tensor(counts).long())
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_equal_views_have_the_plain_mean() -> None:
    losses = normal(7).abs()
    torch.testing.assert_close(weighted_mean(losses, torch.full((7,), 256)), losses.mean())


def test_a_view_without_positions_has_no_effect() -> None:
    losses = torch.tensor([1.0, float("nan"), 3.0], requires_grad=True)
    mean = weighted_mean(losses, torch.tensor([4, 0, 4]))
    mean.backward()
    assert mean == 2
    assert losses.grad is not None
    assert losses.grad.tolist() == [0.5, 0.0, 0.5]
    assert weighted_mean(losses.detach(), torch.zeros(3)) == 0
