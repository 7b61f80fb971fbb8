"""How features travel: float32, bf16, or int8 codes of standardized values."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from radio.errors import RadioError

CODECS = ("float32", "bf16", "int8")
# Standardized values have unit variance in every channel, so one clipped step fits all: 1/16 covers
# +-7.94 standard deviations, with a rounding error of 1/16/sqrt(12) = 0.018 (35 dB).
INT8_STEP = 1 / 16


def encode(x: Tensor, codec: str) -> np.ndarray:
    """Return a tensor as a plain array; bf16 travels as its bits in uint16."""
    if codec == "float32":
        return x.detach().float().contiguous().numpy()
    if codec == "bf16":
        return x.detach().to(torch.bfloat16).contiguous().view(torch.uint16).numpy()
    if codec == "int8":
        if not bool(torch.isfinite(x).all()):
            raise RadioError("int8 codes cannot hold NaN or infinity")
        return (x.detach() / INT8_STEP).round().clamp(-127, 127).to(torch.int8).numpy()
    raise RadioError(f"unknown codec '{codec}'; known: {', '.join(CODECS)}")


def decode(array: np.ndarray, codec: str) -> Tensor:
    """Return what `encode` was given as float32, up to the codec's rounding.

    The array is copied, as arrays out of an object store are read-only.
    """
    if codec == "float32":
        return torch.tensor(array)
    if codec == "bf16":
        return torch.tensor(array).view(torch.bfloat16).float()
    if codec == "int8":
        return torch.tensor(array).float() * INT8_STEP
    raise RadioError(f"unknown codec '{codec}'; known: {', '.join(CODECS)}")
