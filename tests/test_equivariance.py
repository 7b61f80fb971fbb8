"""Shift-equivariant losses against pictures that are cut twice, and float64 loops in NumPy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from radio.training.equivariance import (
    mesa_loss,
    shift_equivariant_loss,
    shift_features,
)
from radio.training.losses import FEATURE_LOSSES, cosine_map_loss, mse_loss

Array = np.ndarray
SEEDS = st.integers(0, 2**32)
SHIFTS = st.tuples(st.integers(-5, 5), st.integers(-5, 5))


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def mask(*shape: int, seed: int = 0) -> Tensor:
    """Return a mask of which about two thirds hold."""
    return normal(*shape, seed=seed) > -0.4


# Oracles


def read_of(x: Array, row: float, column: float) -> Array | None:
    """Read [d, h, w] between positions, or None where a neighbour that counts is outside."""
    value = np.zeros(len(x))
    for i in range(math.floor(row), math.floor(row) + 2):
        for j in range(math.floor(column), math.floor(column) + 2):
            weight = (1 - abs(row - i)) * (1 - abs(column - j))
            if weight < 1e-9:
                continue
            if not (0 <= i < x.shape[1] and 0 <= j < x.shape[2]):
                return None
            value += weight * x[:, i, j]
    return value


def shifted_of(
    x: Array, shift: tuple[int, int], grid: tuple[int, int]
) -> dict[tuple[int, int], Array]:
    """Return the common places u and what x holds at u + shift; shifts count in `grid`."""
    dy, dx = shift[0] * x.shape[1] / grid[0], shift[1] * x.shape[2] / grid[1]
    found = {
        (i, j): read_of(x, i + dy, j + dx) for i in range(x.shape[1]) for j in range(x.shape[2])
    }
    return {u: value for u, value in found.items() if value is not None}


def layer_norm_of(x: Array) -> Array:
    return (x - x.mean()) / np.sqrt(x.var() + 1e-6)


# Shifting


@settings(deadline=None, max_examples=60)
@given(
    seed=SEEDS,
    shifts=st.lists(SHIFTS, min_size=1, max_size=3),
    grid=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    finer=st.tuples(st.integers(0, 4), st.integers(0, 4)),
)
def test_shifted_features_follow_their_oracle(
    seed: int, shifts: list[tuple[int, int]], grid: tuple[int, int], finer: tuple[int, int]
) -> None:
    student_grid = grid[0] + finer[0], grid[1] + finer[1]
    x = normal(len(shifts), 3, *grid, seed=seed).double()
    found, inside = shift_features(x, torch.tensor(shifts), student_grid)
    assert found.dtype == torch.float64
    for view, shift in enumerate(shifts):
        expected = shifted_of(x[view].numpy(), shift, student_grid)
        assert {tuple(u) for u in inside[view].nonzero().tolist()} == expected.keys()
        for (i, j), value in expected.items():
            np.testing.assert_allclose(found[view, :, i, j], value, atol=1e-12)
    assert (found.masked_select(~inside[:, None].expand_as(found)) == 0).all()


@settings(deadline=None, max_examples=40)
@given(seed=SEEDS, size=st.tuples(st.integers(2, 6), st.integers(2, 6)), shift=SHIFTS)
def test_two_crops_of_a_picture_agree_where_they_overlap(
    seed: int, size: tuple[int, int], shift: tuple[int, int]
) -> None:
    (h, w), (dy, dx) = size, shift
    picture = normal(1, 4, h + 10, w + 10, seed=seed)
    student = picture[:, :, 5 : 5 + h, 5 : 5 + w]
    teacher = picture[:, :, 5 + dy : 5 + dy + h, 5 + dx : 5 + dx + w]
    shifts, valid = torch.tensor([shift]), torch.ones(1, h, w, dtype=torch.bool)
    shifted, inside = shift_features(student, shifts)
    overlap = max(0, h - abs(dy)) * max(0, w - abs(dx))
    assert inside.sum() == overlap
    keep = inside[:, None].expand_as(teacher)
    assert torch.equal(shifted[keep], teacher[keep])
    for loss in FEATURE_LOSSES.values():
        found, common = shift_equivariant_loss(student, teacher, valid, shifts, loss=loss)
        assert found.abs().max() < 1e-6
        assert common.tolist() == [overlap]


@pytest.mark.parametrize("shift", [(0, 0), (1, 0), (-1, 3), (2, -2), (-5, 4)])
def test_coarser_grids_read_a_ramp_exactly(shift: tuple[int, int]) -> None:
    """A student of 8 x 12 patches, resized to the teacher's 4 x 5: a plane stays a plane."""

    def plane(top: int, left: int) -> Tensor:
        rows = top + (torch.arange(4).double() + 0.5) * 2 - 0.5
        columns = left + (torch.arange(5).double() + 0.5) * 12 / 5 - 0.5
        return (3 * rows[:, None] - 2 * columns)[None, None]

    valid = torch.ones(1, 4, 5, dtype=torch.bool)
    shifts = torch.tensor([shift])
    loss, common = shift_equivariant_loss(plane(0, 0), plane(*shift), valid, shifts, (8, 12))
    assert common > 0
    assert loss.item() < 1e-24


def test_no_shift_changes_nothing() -> None:
    x, y, valid = normal(2, 3, 4, 5), normal(2, 3, 4, 5, seed=1), mask(2, 4, 5)
    none = torch.zeros(2, 2, dtype=torch.long)
    for student_grid in (None, (4, 5), (9, 11)):
        shifted, inside = shift_features(x, none, student_grid)
        assert torch.equal(shifted, x)
        assert inside.all()
        loss, common = shift_equivariant_loss(x, y, valid, none, student_grid)
        assert torch.equal(loss, mse_loss(x, y, valid))
        assert torch.equal(common, valid.sum((1, 2)))


def test_shifting_back_returns_what_was_common() -> None:
    x = normal(2, 3, 5, 6)
    shift = torch.tensor([[2, -1], [0, 3]])
    there, inside = shift_features(x, shift)
    back, again = shift_features(there, -shift)
    kept, _ = shift_features(inside[:, None].float(), -shift)
    assert torch.equal(kept[:, 0] > 0, again)
    assert torch.equal(back, torch.where(again[:, None], x, 0))


def test_views_and_channels_do_not_mix() -> None:
    x, shift = normal(3, 4, 5, 6), torch.tensor([[1, 0], [-2, 2], [0, -3]])
    expected, inside = shift_features(x, shift, (10, 7))
    order = [2, 0, 1]
    found, found_inside = shift_features(x[order].flip(1), shift[order], (10, 7))
    assert torch.equal(found, expected[order].flip(1))
    assert torch.equal(found_inside, inside[order])


# The loss


@settings(deadline=None, max_examples=30)
@given(seed=SEEDS, shifts=st.lists(SHIFTS, min_size=1, max_size=3), finer=st.integers(0, 3))
def test_the_shifted_loss_follows_its_oracle(
    seed: int, shifts: list[tuple[int, int]], finer: int
) -> None:
    b, grid = len(shifts), (4, 3)
    student_grid = grid[0] + finer, grid[1] + finer
    x, y = normal(b, 5, *grid, seed=seed), normal(b, 5, *grid, seed=seed + 1)
    valid = mask(b, *grid, seed=seed + 2)
    found, common = shift_equivariant_loss(x, y, valid, torch.tensor(shifts), student_grid)
    for view, shift in enumerate(shifts):
        read = shifted_of(x[view].double().numpy(), shift, student_grid)
        target = y[view].double().numpy()
        each = [
            np.mean((value - target[:, i, j]) ** 2)
            for (i, j), value in read.items()
            if valid[view, i, j]
        ]
        assert common[view] == len(each)
        np.testing.assert_allclose(found[view], np.mean(each) if each else 0, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("student_grid", [None, (4, 5), (8, 9)])
@pytest.mark.parametrize("junk", [1e30, float("nan"), float("inf")])
@pytest.mark.parametrize("loss", [mse_loss, cosine_map_loss])
def test_what_is_not_common_has_no_effect_and_no_gradient(
    student_grid: tuple[int, int] | None, junk: float, loss: object
) -> None:
    x, y, valid = normal(3, 6, 4, 5), normal(3, 6, 4, 5, seed=1), mask(3, 4, 5, seed=2)
    shift = torch.tensor([[1, -2], [0, 0], [9, 0]])  # the last two crops have nothing in common
    clean = x.clone().requires_grad_()
    expected, common = shift_equivariant_loss(clean, y, valid, shift, student_grid, loss)
    assert (common > 0).tolist() == [True, True, False]
    assert expected[2] == 0
    expected.sum().backward()
    assert clean.grad is not None
    unread = (clean.grad == 0).all(1, keepdim=True).expand_as(x)
    assert unread[0].any()
    assert unread[2].all()
    spoilt = x.masked_fill(unread, junk).requires_grad_()
    spoilt_y = y.masked_fill(~valid[:, None], -junk).requires_grad_()
    found, _ = shift_equivariant_loss(spoilt, spoilt_y, valid, shift, student_grid, loss)
    assert torch.equal(found, expected)
    found.sum().backward()
    assert spoilt.grad is not None
    assert spoilt_y.grad is not None
    assert torch.equal(spoilt.grad, clean.grad)
    assert (spoilt_y.grad.masked_select(~valid[:, None].expand_as(y)) == 0).all()


@pytest.mark.parametrize("student_grid", [None, (6, 7)])
def test_gradients_are_right(student_grid: tuple[int, int] | None) -> None:
    x, y = normal(2, 3, 4, 4).double().requires_grad_(), normal(2, 3, 4, 4, seed=1).double()
    valid, shift = mask(2, 4, 4, seed=2), torch.tensor([[1, -1], [0, 2]])
    assert torch.autograd.gradcheck(
        lambda p: shift_equivariant_loss(p, y, valid, shift, student_grid)[0], x
    )
    assert torch.autograd.gradcheck(lambda p: mesa_loss(p, y, shift)[0], x)


def test_narrow_inputs_are_computed_in_float32_and_autocast_changes_nothing() -> None:
    x, y = normal(2, 64, 8, 8), normal(2, 64, 8, 8, seed=1)
    valid, shift = mask(2, 8, 8, seed=2), torch.tensor([[1, -1], [0, 2]])
    narrow_x, narrow_y = x.bfloat16(), y.bfloat16()
    for student_grid in (None, (12, 13)):
        exact, _ = shift_equivariant_loss(x, y, valid, shift, student_grid)
        found, _ = shift_equivariant_loss(narrow_x, narrow_y, valid, shift, student_grid)
        wide, _ = shift_equivariant_loss(
            narrow_x.float(), narrow_y.float(), valid, shift, student_grid
        )
        assert found.dtype == torch.float32
        assert torch.equal(found, wide)
        torch.testing.assert_close(found, exact, rtol=1e-2, atol=0)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(shift_equivariant_loss(x, y, valid, shift, student_grid)[0], exact)
    exact, _ = mesa_loss(x, y, shift)
    found, _ = mesa_loss(narrow_x, narrow_y, shift)
    assert found.dtype == torch.float32
    assert torch.equal(found, mesa_loss(narrow_x.float(), narrow_y.float(), shift)[0])
    torch.testing.assert_close(found, exact, rtol=1e-2, atol=0)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(mesa_loss(x, y, shift)[0], exact)


# SE-MESA


@settings(deadline=None, max_examples=30)
@given(seed=SEEDS, shifts=st.lists(SHIFTS, min_size=1, max_size=3))
def test_mesa_follows_its_oracle(seed: int, shifts: list[tuple[int, int]]) -> None:
    b, grid = len(shifts), (4, 3)
    x, y = normal(b, 8, *grid, seed=seed), normal(b, 8, *grid, seed=seed + 1)
    found, common = mesa_loss(x, y, torch.tensor(shifts))
    for view, shift in enumerate(shifts):
        # In the paper's order: first the norm, then the shift
        normed = np.apply_along_axis(layer_norm_of, 0, x[view].double().numpy())
        target = np.apply_along_axis(layer_norm_of, 0, y[view].double().numpy())
        read = shifted_of(normed, shift, grid)
        each = [np.mean((value - target[:, i, j]) ** 2) for (i, j), value in read.items()]
        assert common[view] == len(each)
        np.testing.assert_allclose(found[view], np.mean(each) if each else 0, rtol=1e-4, atol=1e-5)


def test_mesa_knows_no_scale_and_no_offset_of_a_position() -> None:
    x, y, shift = normal(2, 16, 4, 5), normal(2, 16, 4, 5, seed=1), torch.tensor([[1, 0], [0, -2]])
    expected, _ = mesa_loss(x, y, shift)
    scales = 0.5 + normal(2, 1, 4, 5, seed=2).abs()
    offsets = normal(2, 1, 4, 5, seed=3)
    found, _ = mesa_loss(scales * x + offsets, 7 * y - 2, shift)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_mesa_is_zero_for_a_student_that_moves_with_the_picture() -> None:
    picture = normal(1, 8, 10, 10)
    student, ema = picture[:, :, 2:8, 2:8], picture[:, :, 3:9, 0:6]
    loss, common = mesa_loss(student, ema, torch.tensor([[1, -2]]))
    assert loss.item() == 0
    assert common.item() == 5 * 4


def test_mesa_teaches_the_student_alone() -> None:
    x, y = normal(2, 8, 4, 5).requires_grad_(), normal(2, 8, 4, 5, seed=1).requires_grad_()
    mesa_loss(x, y, torch.tensor([[1, 0], [0, -2]]))[0].sum().backward()
    assert y.grad is None
    assert x.grad is not None
    assert (x.grad[0, :, 1:] != 0).all()
    assert (x.grad[0, :, 0] == 0).all()
    assert (x.grad[1, :, :, 3:] == 0).all()


@pytest.mark.parametrize("junk", [float("nan"), float("inf")])
def test_mesa_never_sees_what_is_not_common(junk: float) -> None:
    x, y, shift = normal(1, 8, 4, 5), normal(1, 8, 4, 5, seed=1), torch.tensor([[1, 2]])
    expected, _ = mesa_loss(x, y, shift)
    spoilt, spoilt_y = x.clone(), y.clone()
    spoilt[:, :, 0] = spoilt[:, :, :, :2] = junk
    spoilt_y[:, :, 3:] = spoilt_y[:, :, :, 3:] = junk
    spoilt.requires_grad_()
    found, _ = mesa_loss(spoilt, spoilt_y, shift)
    assert torch.equal(found, expected)
    found.sum().backward()
    assert spoilt.grad is not None
    assert torch.isfinite(spoilt.grad).all()
    assert (spoilt.grad[:, :, 0] == 0).all()
