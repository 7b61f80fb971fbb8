"""Cropped positions against their definition, in plain loops."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from student.positions import (
    eval_positions,
    random_viewports,
    sample_positions,
    train_positions,
)


def ramp(side: int) -> torch.Tensor:
    """Return a table whose two channels are the row and the column in [0, 1]."""
    line = torch.linspace(0, 1, side)
    grid = torch.stack(torch.meshgrid(line, line, indexing="ij"), dim=-1)
    return grid.reshape(1, side * side, 2)


def test_full_square_is_the_table_itself() -> None:
    table = torch.randn(1, 36, 4)
    assert eval_positions(table, 6, 6) is table
    assert train_positions(table, 6, 6, batch=3) is table


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("height,width", [(3, 5), (5, 3), (7, 2), (9, 9), (1, 4)])
def test_eval_is_bilinear_to_the_longer_side_then_the_top_left(
    height: int, width: int, align_corners: bool
) -> None:
    side, longer = 6, max(height, width)
    table = torch.randn(1, side * side, 3)
    image = table.double().reshape(side, side, 3).numpy()
    spots = np.arange(longer)
    if align_corners:
        at = spots * (side - 1) / (longer - 1)
    else:
        at = np.clip((spots + 0.5) * side / longer - 0.5, 0, side - 1)
    low = np.floor(at).astype(int)
    high, part = np.minimum(low + 1, side - 1), at - low
    weights = np.zeros((longer, side))
    np.add.at(weights, (spots, low), 1 - part)
    np.add.at(weights, (spots, high), part)
    expected = np.einsum("yi,xj,ijc->yxc", weights, weights, image)[:height, :width]
    found = eval_positions(table, height, width, align_corners=align_corners)
    np.testing.assert_allclose(found[0].numpy(), expected.reshape(-1, 3), atol=2e-6)


def test_a_viewport_of_a_ramp_shows_its_own_coordinates() -> None:
    extent, offset = random_viewports(16)
    found = sample_positions(ramp(9), 5, 4, extent, offset).reshape(16, 5, 4, 2)
    rows = torch.linspace(0, 1, 5)[None] * extent[:, 1:] + offset[:, 1:]
    columns = torch.linspace(0, 1, 4)[None] * extent[:, :1] + offset[:, :1]
    torch.testing.assert_close(found[..., 0], rows[:, :, None].expand(-1, -1, 4))
    torch.testing.assert_close(found[..., 1], columns[:, None, :].expand(-1, 5, -1))


def test_the_whole_viewport_is_the_aligned_resize() -> None:
    table = torch.randn(1, 49, 3)
    found = sample_positions(table, 4, 4, torch.ones(1, 2), torch.zeros(1, 2))
    torch.testing.assert_close(found, eval_positions(table, 4, 4, align_corners=True))


def test_viewports_cover_what_they_should() -> None:
    torch.manual_seed(0)
    extent, offset = random_viewports(20_000)
    assert extent.min() > 0.1**0.5 * 0.75 - 1e-6 and extent.max() == 1.0
    assert (offset >= 0).all() and (extent + offset <= 1 + 1e-6).all()
    area, aspect = extent.prod(1), (extent[:, 0] / extent[:, 1]).sqrt()
    inside = extent.max(1).values < 1  # not clipped: the drawn scale and aspect can be read back
    assert aspect[inside].min() > 0.75 - 1e-4 and aspect[inside].max() < 4 / 3 + 1e-4
    assert area[inside].min() > 0.1 - 1e-4
    log_aspect = aspect[inside & (area < 0.5)].log()
    assert abs(float(log_aspect.mean())) < 0.01


def test_viewports_follow_the_global_generator_and_differ_between_samples() -> None:
    table = torch.randn(1, 64, 3)
    torch.manual_seed(3)
    first = train_positions(table, 4, 6, batch=2)
    torch.manual_seed(3)
    assert torch.equal(first, train_positions(table, 4, 6, batch=2))
    assert not torch.equal(first, train_positions(table, 4, 6, batch=2))
    assert not torch.equal(first[0], first[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_tables_dtype_is_kept(dtype: torch.dtype) -> None:
    table = torch.randn(1, 16, 3, dtype=dtype)
    assert eval_positions(table, 2, 3).dtype == dtype
    assert train_positions(table, 2, 3, 2).dtype == dtype


def test_gradients_reach_the_table() -> None:
    table = torch.randn(1, 25, 3, requires_grad=True)
    train_positions(table, 8, 8, batch=2).sum().backward()
    assert table.grad is not None and table.grad.abs().sum() > 0


def test_a_table_that_is_no_square_is_refused() -> None:
    with pytest.raises(ValueError, match=r"12 cells.*9 and 16"):
        eval_positions(torch.zeros(1, 12, 2), 2, 2)
