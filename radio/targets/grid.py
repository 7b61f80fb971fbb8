"""Bring two token grids to the coarser of the two, or to the larger (AM-RADIO 2312.06709)."""

from __future__ import annotations

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

Grid = tuple[int, int]


def coarser(first: Grid, second: Grid) -> Grid:
    """Return the smaller number of rows and of columns of two (rows, columns) grids.

    Recipe: both grids to the coarser; ours; losses.grid=coarser;
    tests/test_view_modes.py::test_tiles_are_native_pictures_laid_side_by_side.
    """
    return min(first[0], second[0]), min(first[1], second[1])


def larger(first: Grid, second: Grid) -> Grid:
    """Return the larger number of rows and of columns of two (rows, columns) grids.

    Recipe: both grids to the larger; AM-RADIO (2312.06709); losses.grid=larger;
    tests/test_view_modes.py::test_the_larger_grid_is_am_radios.
    """
    return max(first[0], second[0]), max(first[1], second[1])


GRIDS = {"coarser": coarser, "larger": larger}


def to_grid(features: Float[Tensor, "b c h w"], grid: Grid) -> Float[Tensor, "b c rows columns"]:
    """Resize features bilinearly to (rows, columns); the same grid is returned untouched.

    The filter is widened when shrinking (antialias), so that every position counts, as a mean
    would; align_corners is False.
    """
    if tuple(features.shape[-2:]) == grid:
        return features
    return F.interpolate(features, size=grid, mode="bilinear", antialias=True)


def to_coarser(
    a: Float[Tensor, "b c h w"], b: Float[Tensor, "b d rows columns"]
) -> tuple[Float[Tensor, "b c i j"], Float[Tensor, "b d i j"]]:
    """Return two maps on the coarser of their grids."""
    grid = coarser((a.shape[-2], a.shape[-1]), (b.shape[-2], b.shape[-1]))
    return to_grid(a, grid), to_grid(b, grid)
