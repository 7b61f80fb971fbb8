"""Losses: pure functions from predictions and targets to one number per view.

Legend: b views, c channels, h w grid. All compute in float32 or wider, whatever they are given.
Positions that are not valid have no effect and no gradient, even where they hold NaN.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

from radio.targets.angles import PerView, Summaries, angle_between, unit, wide

Maps = Float[Tensor, "b c h w"]
Valid = Bool[Tensor, "b h w"]

# C-RADIOv4 divides the squared angle by each teacher's measured dispersion (`angle_dispersion`:
# SigLIP2-g 0.694, DINOv3-7B 2.186), which `fit` measures. Without one, a right angle costs 1.
RIGHT_ANGLE = (math.pi / 2) ** 2


def cosine_loss(
    predicted: Summaries, target: Summaries, dispersion: float = RIGHT_ANGLE
) -> PerView:
    """1 - cos(x, y) (AM-RADIO 2312.06709, section 3); 1 where a vector is zero.

    A teacher's spread does not enter.

    Recipe: cosine summary loss; AM-RADIO (2312.06709) section 3; losses.summary=cosine;
    tests/test_losses.py::test_summary_losses_follow_their_oracles.
    """
    return 1 - (unit(wide(predicted), -1) * unit(wide(target), -1)).sum(-1)


def angle_loss(
    predicted: Summaries, target: Summaries, dispersion: float | Float[Tensor, ""] = RIGHT_ANGLE
) -> PerView:
    """Theta(x, y)^2 / Disp(Theta_y), in radians squared over the teacher's own spread (C-RADIOv4).

    Args:
        predicted: x.
        target: y.
        dispersion: Disp, the teacher's `angle_dispersion`.

    Recipe: angle summary loss; C-RADIOv4 (2601.17237); losses.summary=angle;
    tests/test_losses.py::test_summary_losses_follow_their_oracles.
    """
    return angle_between(predicted, target).square() / dispersion


def mse_loss(predicted: Maps, target: Maps, valid: Valid) -> PerView:
    """Mean over valid positions and channels of (x - y)^2 (PHI-S 2410.01680).

    Recipe: squared error on standardized features; PHI-S (2410.01680); losses.feature=mse;
    tests/test_losses.py::test_losses_agree_with_torch_where_all_is_valid.
    """
    return _masked_mean(_difference(predicted, target, valid).square().mean(1), valid)


def smooth_l1_loss(predicted: Maps, target: Maps, valid: Valid) -> PerView:
    """Mean over valid positions and channels of d^2 / 2 for |d| < 1, else |d| - 1/2; d = x - y.

    Recipe: smooth-L1 feature loss; AM-RADIO (2312.06709) section 3; losses.feature=smooth_l1;
    tests/test_losses.py::test_losses_agree_with_torch_where_all_is_valid.
    """
    difference = _difference(predicted, target, valid)
    error = F.smooth_l1_loss(difference, torch.zeros_like(difference), reduction="none")
    return _masked_mean(error.mean(1), valid)


def cosine_map_loss(predicted: Maps, target: Maps, valid: Valid) -> PerView:
    """Mean over valid positions of 1 - cos between feature vectors.

    Recipe: cosine feature loss; AM-RADIO (2312.06709) section 3; losses.feature=cosine;
    tests/test_losses.py::test_feature_losses_follow_their_oracles.
    """
    x, y = (unit(_masked(wide(maps), valid), 1) for maps in (predicted, target))
    return _masked_mean(1 - (x * y).sum(1), valid)


def hybrid_loss(predicted: Maps, target: Maps, valid: Valid) -> PerView:
    """0.9 (1 - cos) + 0.1 smooth-L1 (AM-RADIO 2312.06709, section 3).

    Recipe: hybrid feature loss, 0.9 cosine and 0.1 smooth-L1; AM-RADIO (2312.06709) section 3;
    losses.feature=hybrid; tests/test_losses.py::test_feature_losses_follow_their_oracles.
    """
    cosine = cosine_map_loss(predicted, target, valid)
    return 0.9 * cosine + 0.1 * smooth_l1_loss(predicted, target, valid)


def token_similarity_loss(predicted: Maps, target: Maps, valid: Valid) -> PerView:
    """Mean over pairs i, j of a view's valid positions of (cos(x_i, x_j) - cos(y_i, y_j))^2.

    DINOv3's Gram anchoring |X X^T - Y Y^T|_F^2 on unit features (2508.10104, section 4), per
    picture and divided by the number of pairs. It compares relations only: neither the scale of a
    position nor a rotation common to all has an effect. Takes b (h w)^2 numbers of memory.

    Recipe: token similarity loss (Gram anchoring); DINOv3 (2508.10104) section 4;
    losses.feature=token_similarity;
    tests/test_losses.py::test_token_similarity_knows_neither_scales_nor_rotations.
    """
    with torch.autocast(predicted.device.type, enabled=False):  # it would multiply in bfloat16
        x, y = (unit(_masked(wide(maps), valid), 1).flatten(2) for maps in (predicted, target))
        difference = x.mT @ x - y.mT @ y  # 0 wherever i or j is not valid
    pairs = valid.sum((1, 2)).square().clamp_min(1)
    return difference.square().sum((1, 2)) / pairs


def weighted_sum(per_example: PerView, num_valid: Shaped[Tensor, " b"]) -> Float[Tensor, 2]:
    """Return (sum of weight x loss, sum of weights), a view's weight sqrt(valid positions).

    So RADIO weighs resolutions. A view without valid positions has no effect.

    Recipe: views weighted by the root of their valid tokens; NVIDIA-TAO/tao-pytorch; always;
    tests/test_losses.py::test_views_weigh_the_root_of_their_valid_positions.
    """
    values = wide(per_example)
    weights = num_valid.to(values.dtype).sqrt()
    kept = torch.where(weights > 0, values, torch.zeros_like(values))
    return torch.stack([(kept * weights).sum(), weights.sum()])


def _difference(predicted: Maps, target: Maps, valid: Valid) -> Maps:
    return _masked(wide(predicted) - wide(target), valid)


def _masked(maps: Maps, valid: Valid) -> Maps:
    """Put zeros where not valid; before any square or root, so that no NaN enters a gradient."""
    zero = torch.zeros((), dtype=maps.dtype, device=maps.device)
    return torch.where(valid[:, None], maps, zero)


def _masked_mean(error: Float[Tensor, "b h w"], valid: Valid) -> PerView:
    """Mean over valid positions; a view without any gives 0."""
    kept = torch.where(valid, error, torch.zeros((), dtype=error.dtype, device=error.device))
    return kept.sum((1, 2)) / valid.sum((1, 2)).clamp_min(1)


SUMMARY_LOSSES: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {
    "cosine": cosine_loss,
    "angle": angle_loss,
}
FEATURE_LOSSES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "mse": mse_loss,
    "smooth_l1": smooth_l1_loss,
    "cosine": cosine_map_loss,
    "hybrid": hybrid_loss,
    "token_similarity": token_similarity_loss,
}
