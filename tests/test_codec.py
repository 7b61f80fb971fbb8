"""Codecs: exact, bit-equal to torch's bf16, or within half a step."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from radio import RadioError
from radio.targets.codec import CODECS, INT8_LIMIT, INT8_STEP, decode, encode

CARRIERS = {"float32": np.float32, "bf16": np.uint16, "int8": np.int8}


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("codec", CODECS)
def test_shape_and_carrier_are_kept(codec: str) -> None:
    x = normal(2, 5, 3, 4)
    array = encode(x, codec)
    assert (array.shape, array.dtype) == (x.shape, CARRIERS[codec])
    back = decode(array, codec)
    assert (back.shape, back.dtype) == (x.shape, torch.float32)


@pytest.mark.parametrize("codec", CODECS)
def test_coding_twice_changes_nothing_more(codec: str) -> None:
    once = decode(encode(normal(1000), codec), codec)
    assert torch.equal(decode(encode(once, codec), codec), once)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_every_float_type_and_layout_is_taken(codec: str, dtype: torch.dtype) -> None:
    x = normal(6, 4).to(dtype)
    expected = decode(encode(x.float(), codec), codec)
    assert torch.equal(decode(encode(x, codec), codec), expected)
    assert torch.equal(decode(encode(x.T, codec), codec), expected.T)
    assert torch.equal(decode(encode(x.requires_grad_(), codec), codec), expected)


@settings(deadline=None)
@given(st.lists(st.floats(width=32), min_size=1))
def test_float32_keeps_every_bit(values: list[float]) -> None:
    x = torch.tensor(values, dtype=torch.float32)
    assert torch.equal(
        decode(encode(x, "float32"), "float32").view(torch.int32), x.view(torch.int32)
    )


@settings(deadline=None)
@given(st.lists(st.floats(width=32), min_size=1))
def test_bf16_has_the_bits_of_torch(values: list[float]) -> None:
    x = torch.tensor(values, dtype=torch.float32)
    theirs = x.to(torch.bfloat16)
    assert np.array_equal(encode(x, "bf16"), theirs.view(torch.uint16).numpy())
    torch.testing.assert_close(
        decode(encode(x, "bf16"), "bf16"), theirs.float(), rtol=0, atol=0, equal_nan=True
    )


def test_bf16_rounds_ties_to_even() -> None:
    # 1 + 2^-8 lies between 1 and 1 + 2^-7; 1 + 3 2^-8 between 1 + 2^-7 and 1 + 2^-6.
    x = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8])
    assert decode(encode(x, "bf16"), "bf16").tolist() == [1.0, 1 + 2**-6]


@settings(deadline=None)
@given(st.lists(st.floats(-INT8_LIMIT * INT8_STEP, INT8_LIMIT * INT8_STEP, width=32), min_size=1))
def test_int8_is_within_half_a_step(values: list[float]) -> None:
    x = torch.tensor(values)
    assert (decode(encode(x, "int8"), "int8") - x).abs().max() <= INT8_STEP / 2


def test_int8_clips_evenly() -> None:
    limit = INT8_LIMIT * INT8_STEP
    assert decode(encode(torch.tensor([-1e30, 1e30, 8.0]), "int8"), "int8").tolist() == [
        -limit,
        limit,
        limit,
    ]


def test_int8_has_the_stated_signal_to_noise_ratio() -> None:
    x = normal(400_000)
    noise = decode(encode(x, "int8"), "int8") - x
    decibels = 10 * torch.log10(x.square().mean() / noise.square().mean())
    assert abs(float(decibels) - 34.9) < 0.1


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_nan_is_kept_to_be_named_or_refused(bad: float) -> None:
    x = torch.tensor([1.0, bad])
    for codec in ("float32", "bf16"):
        torch.testing.assert_close(decode(encode(x, codec), codec), x, equal_nan=True)
    with pytest.raises(RadioError, match="NaN"):
        encode(x, "int8")


@pytest.mark.parametrize("codec", CODECS)
def test_a_read_only_array_becomes_a_tensor_of_its_own(codec: str) -> None:
    array = encode(normal(8), codec).copy()
    array.flags.writeable = False
    back = decode(array, codec)
    before = array.copy()
    back += 1
    assert np.array_equal(array, before)


def test_an_unknown_codec_lists_the_known_ones() -> None:
    for use in (lambda: encode(normal(2), "int4"), lambda: decode(np.zeros(2), "int4")):
        with pytest.raises(RadioError, match="'int4'; known: float32, bf16, int8"):
            use()


def test_an_array_of_another_codec_is_refused() -> None:
    with pytest.raises(RadioError, match="'bf16' travels as uint16, but the array is int8"):
        decode(encode(normal(2), "int8"), "bf16")


@pytest.mark.parametrize("codec", CODECS)
def test_nothing_at_all_can_travel(codec: str) -> None:
    assert decode(encode(torch.zeros(0, 4), codec), codec).shape == (0, 4)
