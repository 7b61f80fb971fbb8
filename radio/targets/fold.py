"""Compose a Linear with an affine map that comes after it."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor


def folded(
    weight: Float[Tensor, "out hidden"],
    bias: Float[Tensor, " out"],
    matrix: Float[Tensor, "c c"],
    shift: Float[Tensor, " c"],
) -> tuple[Float[Tensor, "out hidden"], Float[Tensor, " out"]]:
    """Return the (weight, bias) of x -> matrix (weight x + bias) + shift.

    Several outputs side by side (out = n c, an upsampling head's) are mapped one by one. Computed
    in float64, returned as float32.
    """
    matrix, shift = matrix.to(weight.device), shift.to(weight.device)
    weights = weight.double().unflatten(0, (-1, len(shift)))
    biases = bias.double().unflatten(0, (-1, len(shift)))
    mapped = (matrix @ weights).flatten(0, 1), (biases @ matrix.mT + shift).flatten()
    return mapped[0].float(), mapped[1].float()
