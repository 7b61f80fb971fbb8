"""Compose a Linear with an affine map that comes after it."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor


def folded(
    weight: Float[Tensor, "out hidden"],
    bias: Float[Tensor, " out"],
    matrix: Float[Tensor, "out out"],
    shift: Float[Tensor, " out"],
) -> tuple[Float[Tensor, "out hidden"], Float[Tensor, " out"]]:
    """Return the (weight, bias) of x -> matrix (weight x + bias) + shift.

    Computed in float64, returned as float32.
    """
    matrix, shift = matrix.to(weight.device), shift.to(weight.device)
    return (matrix @ weight.double()).float(), (matrix @ bias.double() + shift).float()
