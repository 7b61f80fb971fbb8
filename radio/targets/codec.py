"""How features travel: float32, bf16, or int8 codes of standardized values."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from radio.errors import RadioError

# Standardized values have unit variance in every channel, so one clipped uniform step fits all:
# 1/16 covers +-7.94 standard deviations with a rounding error of 1/16/sqrt(12) = 0.018 rms, that
# is 34.9 dB below the values. Codes run from -127 to 127; what lies outside is clipped.
INT8_STEP = 1 / 16
INT8_LIMIT = 127

_CARRIERS: dict[str, np.dtype[Any]] = {
    "float32": np.dtype(np.float32),
    "bf16": np.dtype(np.uint16),
    "int8": np.dtype(np.int8),
}
CODECS = tuple(_CARRIERS)


def encode(x: Tensor, codec: str) -> np.ndarray:
    """Return a tensor as a plain array of the same shape.

    `float32` is exact for what is no wider; `bf16` rounds to nearest, ties to even, and travels as
    its bits in uint16; `int8` holds round(16 x) clipped to +-127 (34.9 dB for unit variance). The
    first two keep NaN and infinity, to be named downstream. The array may share x's memory.

    Raises:
        RadioError: an unknown codec, or NaN or infinity in int8.

    Recipe: features sent in float32; ours; codec=float32;
    tests/test_codec.py::test_float32_keeps_every_bit.
    Recipe: features sent in bf16; ours; codec=bf16;
    tests/test_codec.py::test_bf16_has_the_bits_of_torch.
    Recipe: standardized features sent as int8 codes; ours; codec=int8;
    tests/test_codec.py::test_int8_has_the_stated_signal_to_noise_ratio.
    """
    _carrier(codec)
    values = x.detach().cpu()
    if codec == "float32":
        return values.float().contiguous().numpy()
    if codec == "bf16":
        return values.to(torch.bfloat16).contiguous().view(torch.uint16).numpy()
    if not bool(torch.isfinite(values).all()):
        raise RadioError("int8 codes cannot hold NaN or infinity; look at the teacher's features")
    codes = (values.float() / INT8_STEP).round().clamp(-INT8_LIMIT, INT8_LIMIT)
    return codes.to(torch.int8).contiguous().numpy()


def decode(array: np.ndarray, codec: str) -> Tensor:
    """Return what `encode` was given as float32, up to the codec's rounding.

    The tensor is a copy, as arrays out of an object store are read-only.

    Raises:
        RadioError: an unknown codec, or an array of another codec's type.
    """
    carrier = _carrier(codec)
    if array.dtype != carrier:
        raise RadioError(
            f"codec '{codec}' travels as {carrier.name}, but the array is {array.dtype}; "
            "decode with the codec it was encoded with"
        )
    shared = torch.utils.dlpack.from_dlpack(array)  # from_numpy warns of read-only pages
    if codec == "float32":
        return shared.clone()
    if codec == "bf16":
        return shared.view(torch.bfloat16).float()
    return shared.float().mul_(INT8_STEP)


def _carrier(codec: str) -> np.dtype[Any]:
    if codec not in _CARRIERS:
        raise RadioError(f"unknown codec '{codec}'; known: {', '.join(CODECS)}")
    return _CARRIERS[codec]
