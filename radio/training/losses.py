"""Losses: pure functions from predictions and targets to one number per view.

Legend: b views, c channels, h w grid. All compute in float32 or wider, whatever they are given.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

Summaries = Float[Tensor, "b c"]
Maps = Float[Tensor, "b c h w"]
Valid = Bool[Tensor, "b h w"]
PerView = Float[Tensor, " b"]


def cosine_loss(predicted: Summaries, target: Summaries) -> PerView:
    """1 - cos(x, y) (AM-RADIO 2312.06709, eq. 2)."""
    return 1 - F.cosine_similarity(_wide(predicted), _wide(target), dim=-1)


def angle_loss(predicted: Summaries, target: Summaries, dispersion: float) -> PerView:
    """Theta(x, y)^2 / Disp (C-RADIOv4): the squared angle over the teacher's own spread.

    The angle is atan2(|u - v|, |u + v|) * 2 of the unit vectors, whose gradient stays finite
    where arccos has none.
    """
    x = F.normalize(_wide(predicted), dim=-1)
    y = F.normalize(_wide(target), dim=-1)
    return angle_between(x, y).square() / dispersion


def angle_between(x: Summaries, y: Summaries) -> PerView:
    """Return the angle in radians between unit vectors."""
    tiny = torch.finfo(x.dtype).tiny
    apart = (x - y).square().sum(-1).clamp_min(tiny).sqrt()
    together = (x + y).square().sum(-1).clamp_min(tiny).sqrt()
    return 2 * torch.atan2(apart, together)


def angle_dispersion(targets: Summaries) -> Float[Tensor, ""]:
    """Disp = E[Theta(y, mu)^2], mu = E[y] / |E[y]| over unit vectors y (C-RADIOv4)."""
    unit = F.normalize(_wide(targets), dim=-1)
    centre = F.normalize(unit.mean(0, keepdim=True), dim=-1)
    return angle_between(unit, centre.expand_as(unit)).square().mean()


def mse_loss(predicted: Maps, target: Maps, valid: Valid) -> PerView:
    """Mean over valid positions and channels of (x - y)^2 (PHI-S 2410.01680)."""
    return _masked_mean((_wide(predicted) - _wide(target)).square().mean(1), valid)


def smooth_l1_loss(predicted: Maps, target: Maps, valid: Valid) -> PerView:
    """Mean over valid positions and channels of the Huber-like loss with beta 1."""
    error = F.smooth_l1_loss(_wide(predicted), _wide(target), reduction="none")
    return _masked_mean(error.mean(1), valid)


def cosine_map_loss(predicted: Maps, target: Maps, valid: Valid) -> PerView:
    """Mean over valid positions of 1 - cos between feature vectors."""
    return _masked_mean(1 - F.cosine_similarity(_wide(predicted), _wide(target), dim=1), valid)


def hybrid_loss(predicted: Maps, target: Maps, valid: Valid) -> PerView:
    """0.9 cos + 0.1 smooth-L1 (AM-RADIO 2312.06709, eq. 3, alpha 0.9, beta 0.1)."""
    cosine = cosine_map_loss(predicted, target, valid)
    return 0.9 * cosine + 0.1 * smooth_l1_loss(predicted, target, valid)


def weighted_mean(per_view: PerView, num_valid: Shaped[Tensor, " b"]) -> Float[Tensor, ""]:
    """Mean over views weighted by sqrt(valid positions), as RADIO weighs resolutions."""
    weights = num_valid.to(per_view.dtype).sqrt()
    return (per_view * weights).sum() / weights.sum().clamp_min(1e-12)


def _masked_mean(error: Float[Tensor, "b h w"], valid: Valid) -> PerView:
    """Mean over valid positions; a view without any gives 0."""
    kept = torch.where(valid, error, torch.zeros((), dtype=error.dtype, device=error.device))
    return kept.sum((1, 2)) / valid.sum((1, 2)).clamp_min(1)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


# C-RADIOv4 divides by each teacher's measured dispersion; undivided, a right angle costs 1.
RIGHT_ANGLE = (math.pi / 2) ** 2


def _plain_angle_loss(predicted: Summaries, target: Summaries) -> PerView:
    return angle_loss(predicted, target, RIGHT_ANGLE)


SUMMARY_LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cosine": cosine_loss,
    "angle": _plain_angle_loss,
}
FEATURE_LOSSES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "mse": mse_loss,
    "smooth_l1": smooth_l1_loss,
    "cosine": cosine_map_loss,
    "hybrid": hybrid_loss,
}
