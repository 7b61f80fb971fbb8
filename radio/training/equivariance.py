"""Shift equivariance: losses between crops of one picture that lie whole patches apart.

A teacher's fixed pattern stays where it is when its crop moves; what it says of the picture moves
along (C-RADIOv4). Compared at the same place of the picture, only the latter can be learnt.

Legend: b views, d channels, h w grid. A crop shifted by (dy, dx) starts dy student positions below
and dx to the right of the student's crop: what it sees at u, the student sees at u + (dy, dx). All
compute in float32 or wider; what is not common to both crops has no effect and no gradient, even
where it holds NaN.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from radio.targets.angles import PerView, wide
from radio.targets.grid import Grid
from radio.training.losses import Maps, Valid, mse_loss

Shifts = Int[Tensor, "b 2"]
Counts = Int[Tensor, " b"]
MESA = "average/mesa"  # the loss that is no teacher's
LAYER_NORM_EPS = 1e-6  # as in the student's own layers


def shift_features(
    features: Maps, shift: Shifts, student_grid: Grid | None = None
) -> tuple[Maps, Valid]:
    """Return F_{S->T}[x], F_{S->T}[x]_u = x_{u + shift}, and where it lies inside x (C-RADIOv4).

    Args:
        features: x, projected to the teacher's channels before; after gives other gradients.
        shift: (dy, dx) in positions of `student_grid`.
        student_grid: the student's own (rows, columns), if x was resized to a coarser grid since. A
            shift is then no whole number of positions: x is read bilinearly, and u is valid only
            where all neighbours with a weight are inside.

    Returns:
        F_{S->T}[x] [b, d, h, w], 0 where not valid, and the mask [b, h, w].
    """
    rows, columns = student_grid or (features.shape[-2], features.shape[-1])
    shift = shift.to(features.device)
    moved, inside_rows = _shift_axis(wide(features), shift[:, 0], 2, rows)
    moved, inside_columns = _shift_axis(moved, shift[:, 1], 3, columns)
    inside = inside_rows[:, :, None] & inside_columns[:, None, :]
    zero = torch.zeros((), dtype=moved.dtype, device=moved.device)
    return torch.where(inside[:, None], moved, zero), inside


def shift_equivariant_loss(
    predicted: Maps,
    target: Maps,
    valid: Valid,
    shift: Shifts,
    student_grid: Grid | None = None,
    loss: Callable[[Tensor, Tensor, Tensor], Tensor] = mse_loss,
) -> tuple[PerView, Counts]:
    """Return L = 1/|Omega| sum_{u in Omega} (F_{S->T}[x]_u - y_u)^2 and |Omega| (C-RADIOv4).

    The square is a mean over channels. A view without common positions gives 0 and 0.

    Args:
        predicted: x [b, d, h, w], the student's prediction on its own crop, already projected.
        target: y [b, d, h, w], the standardized features of the teacher's crop.
        valid: where y holds features; Omega is where F_{S->T}[x] does, too.
        shift: (dy, dx) of the teacher's crop from the student's, in student positions.
        student_grid: see `shift_features`.
        loss: any other of FEATURE_LOSSES in the place of the square.

    Recipe: shift-equivariant feature loss; C-RADIOv4 (2601.17237); data.shift_margin;
    tests/test_equivariance.py::test_the_shifted_loss_follows_its_oracle.
    """
    shifted, inside = shift_features(predicted, shift, student_grid)
    common = inside & valid
    return loss(shifted, target, common), common.sum((1, 2))


def mesa_loss(student: Maps, ema: Maps, shift: Shifts) -> tuple[PerView, Counts]:
    """Return 1/|Omega| sum_u (F_{S->S~}[LN x]_u - LN(x~)_u)^2 and |Omega| (SE-MESA, C-RADIOv4).

    LN is a layer norm over channels without affine, the square a mean over channels; no gradient
    reaches x~. Shifts are whole, so LN and F commute; F goes first, since it masks.

    Args:
        student: x [b, d, h, w], the student's features.
        ema: x~ [b, d, h, w], those of its moving average on another crop.
        shift: (dy, dx) of that crop from the student's, in student positions.

    Recipe: SE-MESA, the student against its average; C-RADIOv4 (2601.17237); losses.mesa_weight;
    tests/test_equivariance.py::test_mesa_follows_its_oracle.
    """
    shifted, inside = shift_features(student, shift)
    return mse_loss(_layer_norm(shifted), _layer_norm(ema.detach()), inside), inside.sum((1, 2))


def _shift_axis(
    values: Maps, shift: Int[Tensor, " b"], dim: int, student_size: int
) -> tuple[Maps, Bool[Tensor, "b n"]]:
    """Read one axis of the grid at u + shift * size / student_size, exactly in whole numbers."""
    size = values.shape[dim]
    places = torch.arange(size, device=shift.device) * student_size + shift[:, None] * size
    low, part = places // student_size, places % student_size
    high = low + (part > 0)  # a neighbour without weight is not read: it may be outside, or NaN
    inside = (low >= 0) & (high < size)
    moved = _take(values, low.clamp(0, size - 1), dim)
    if student_size != size:
        weight = _along(part, dim).to(values.dtype) / student_size
        moved = torch.lerp(moved, _take(values, high.clamp(0, size - 1), dim), weight)
    return moved, inside


def _take(values: Maps, index: Int[Tensor, "b n"], dim: int) -> Maps:
    return values.gather(dim, _along(index, dim).expand(values.shape))


def _along(index: Int[Tensor, "b n"], dim: int) -> Int[Tensor, "b 1 rows columns"]:
    return index[:, None, :, None] if dim == 2 else index[:, None, None, :]


def _layer_norm(maps: Maps) -> Float[Tensor, "b c h w"]:
    last = wide(maps).movedim(1, -1)
    return F.layer_norm(last, last.shape[-1:], eps=LAYER_NORM_EPS).movedim(-1, 1)
