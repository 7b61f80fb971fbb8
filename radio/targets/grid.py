"""Bring two token grids to the coarser of the two."""

from __future__ import annotations

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

Grid = tuple[int, int]


def coarser(first: Grid, second: Grid) -> Grid:
    """Return the smaller number of rows and of columns of two (rows, columns) grids."""
    return min(first[0], second[0]), min(first[1], second[1])


def to_grid(features: Float[Tensor, "b c h w"], grid: Grid) -> Float[Tensor, "b c rows columns"]:
    """Resize features bilinearly to (rows, columns); the same grid is returned untouched.

    The filter is widened when shrinking (antialias), so that every position counts, as a mean
    would; align_corners is False.
    """
    if tuple(features.shape[-2:]) == grid:
        return features
    return F.interpolate(features, size=grid, mode="bilinear", antialias=True)
