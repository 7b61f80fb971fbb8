"""Angles between vectors, and how far a teacher's summaries spread (C-RADIOv4).

Legend: b views, c channels. All compute in float32 or wider.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

Summaries = Float[Tensor, "b c"]
PerView = Float[Tensor, " b"]

# No vector is divided by less, so that the gradient at a zero prediction is not boundless.
SMALLEST_NORM = 1e-6


def angle_between(x: Summaries, y: Summaries) -> PerView:
    """Return Theta(x, y) in radians, 0 to pi.

    Theta = 2 atan2(|u - v|, |u + v|) of the unit vectors, exact for small angles and with a
    finite gradient where that of arccos(cos) is infinite.
    """
    u, v = unit(wide(x), -1), unit(wide(y), -1)
    return 2 * torch.atan2(norm(u - v, -1), norm(u + v, -1)).squeeze(-1)


def angle_dispersion(targets: Summaries) -> Float[Tensor, ""]:
    """Disp = E[Theta(y, mu)^2], mu = E[y] / |E[y]|, in radians squared (C-RADIOv4).

    Recipe: measured dispersion of the summaries; C-RADIOv4 (2601.17237); losses.summary=angle;
    tests/test_shifts.py::test_the_spread_of_summaries_is_measured_and_divides_the_angle.
    """
    centre = wide(targets).mean(0, keepdim=True)
    return angle_between(wide(targets), centre.expand(len(targets), -1)).square().mean()


def unit(x: Tensor, dim: int) -> Tensor:
    """Return x over its norm; zero stays zero."""
    return x / norm(x, dim).clamp_min(SMALLEST_NORM)


def norm(x: Tensor, dim: int) -> Tensor:
    """Return the Euclidean norm, kept as a dimension, with gradient 0 at zero."""
    tiny = torch.finfo(x.dtype).tiny
    return x.square().sum(dim, keepdim=True).clamp_min(tiny).sqrt()


def wide(x: Tensor) -> Tensor:
    """Return x in float32, or in float64 if it is that already."""
    return x if x.dtype == torch.float64 else x.float()
