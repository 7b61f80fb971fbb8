"""Standardizers: the bars, statistics, application and refusals of all kinds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from radio import RadioError
from radio.targets.standardize import (
    STANDARDIZERS,
    PerChannel,
    PhiS,
    Standardizer,
    load_standardizers,
    make_standardizer,
    save_standardizers,
)

KINDS = tuple(STANDARDIZERS)
WHITENINGS = ("pca", "zca", "hadamard")
WIDTHS = (12, 92, 192, 384, 668, 768, 770, 1024, 1152, 1280, 1408, 1536)


def rows(n: int, c: int, seed: int = 0, rank: int | None = None) -> Tensor:
    """Correlated rows of very different scales and means, float64."""
    generator = torch.Generator().manual_seed(seed)
    rank = rank or c
    latent = torch.randn(n, rank, generator=generator, dtype=torch.float64)
    basis = torch.randn(rank, c, generator=generator, dtype=torch.float64)
    scales = 10 ** torch.linspace(-1, 1, c, dtype=torch.float64)
    mean = 3 * torch.randn(c, generator=generator, dtype=torch.float64)
    return (latent @ basis / rank**0.5 + mean) * scales


def variances(x: Tensor) -> Tensor:
    return x.var(0, correction=0)


def covariance(x: Tensor) -> np.ndarray:
    return np.cov(x.numpy().T, bias=True)


# Bars


def check_bars(c: int) -> None:
    x = rows(c + 200, c)
    standardizer = PhiS(c, "wide").partial_fit(x).fit()
    y = standardizer.transform(x)
    assert (variances(y) - 1).abs().max() < 1e-6
    assert y.mean(0).abs().max() < 1e-6
    weight, bias = standardizer.as_linear()
    assert weight.dtype == bias.dtype == torch.float64
    assert (y @ weight.T + bias - x).abs().max() < 1e-9


@pytest.mark.parametrize("c", WIDTHS)
def test_every_channel_has_variance_one_and_the_inverse_is_linear(c: int) -> None:
    check_bars(c)


@pytest.mark.slow
def test_so400m_hidden_width_holds_the_bars_too() -> None:
    check_bars(4304)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("c", "rank"), [(1, 1), (7, 7), (24, 24), (24, 5), (92, 30)])
def test_the_inverse_inverts(kind: str, c: int, rank: int) -> None:
    x = rows(4 * c + 2, c, rank=rank)
    standardizer = make_standardizer(kind, c, "clip").partial_fit(x).fit()
    y = standardizer.transform(x)
    weight, bias = standardizer.as_linear()
    assert (y @ weight.T + bias - x).abs().max() < 1e-9 * x.abs().max()
    assert (standardizer.inverse_transform(y) - x).abs().max() < 1e-9 * x.abs().max()
    assert torch.equal(weight, standardizer.inverse)


# Statistics


@settings(deadline=None, max_examples=40)
@given(
    parts=st.lists(st.integers(0, 30), min_size=1, max_size=6).filter(lambda p: sum(p) > 1),
    offset=st.floats(-1e4, 1e4),
    order=st.randoms(use_true_random=False),
)
def test_statistics_do_not_depend_on_how_rows_arrive(
    parts: list[int], offset: float, order: object
) -> None:
    x = rows(sum(parts), 5) + offset
    whole = PhiS(5).partial_fit(x)
    pieces = [PhiS(5).partial_fit(piece) for piece in x.split(parts)]
    order.shuffle(pieces)  # type: ignore[attr-defined]
    merged = PhiS(5)
    for piece in pieces:
        merged.merge(piece)
    state = merged.state_dict()
    assert int(state["count"]) == len(x)
    scale = max(1.0, float(x.abs().max()))
    np.testing.assert_allclose(state["sample_mean"], x.mean(0), atol=1e-12 * scale)
    scatter = covariance(x) * len(x)
    np.testing.assert_allclose(state["scatter"], scatter, atol=1e-12 * scale**2 * len(x))
    np.testing.assert_allclose(whole.state_dict()["scatter"], state["scatter"], atol=1e-9 * scale)


def test_a_large_mean_loses_no_digits() -> None:
    x = rows(1000, 4) + 1e6
    standardizer = PhiS(4)
    for piece in x.split(100):
        standardizer.partial_fit(piece)
    assert (variances(standardizer.fit().transform(x)) - 1).abs().max() < 1e-6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_statistics_are_float64_whatever_the_rows_are(dtype: torch.dtype) -> None:
    x = rows(500, 4).to(dtype)
    state = PhiS(4).partial_fit(x).state_dict()
    np.testing.assert_allclose(state["sample_mean"], x.double().mean(0), rtol=1e-12)
    np.testing.assert_allclose(state["scatter"], covariance(x.double()) * 500, rtol=1e-9)


def test_merging_leaves_the_other_as_it_was() -> None:
    one, two = (PhiS(4).partial_fit(rows(20, 4, seed)) for seed in (1, 2))
    before = {key: value.clone() for key, value in two.state_dict().items()}
    one.merge(two).partial_fit(rows(5, 4))
    assert all(torch.equal(value, before[key]) for key, value in two.state_dict().items())


def test_rows_after_a_fit_count_from_the_next_fit_on() -> None:
    first, second = rows(50, 6, 1), rows(70, 6, 2) * 5
    standardizer = PhiS(6).partial_fit(first).fit()
    before = standardizer.transform(first)
    standardizer.partial_fit(second)
    assert torch.equal(standardizer.transform(first), before)
    standardizer.fit()
    both = torch.cat([first, second])
    assert (variances(standardizer.transform(both)) - 1).abs().max() < 1e-9


# Applying


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(6,), (3, 6), (2, 3, 4, 6), (0, 6)])
def test_any_leading_shape_is_taken(kind: str, shape: tuple[int, ...]) -> None:
    standardizer = make_standardizer(kind, 6).partial_fit(rows(50, 6)).fit()
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    expected = (x - standardizer.mean) @ standardizer.matrix.T
    torch.testing.assert_close(standardizer.transform(x), expected)
    torch.testing.assert_close(standardizer.inverse_transform(standardizer.transform(x)), x)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 1e-2), (torch.float16, 2e-3)],
)
def test_dtype_is_kept_and_narrow_ones_are_computed_wide(
    kind: str, dtype: torch.dtype, tolerance: float
) -> None:
    fitting = rows(200, 12) - 5
    standardizer = make_standardizer(kind, 12).partial_fit(fitting).fit()
    x = fitting[:40].to(dtype)
    y = standardizer.transform(x)
    assert y.dtype == standardizer.inverse_transform(y).dtype == dtype
    exact = standardizer.transform(x.double())
    assert (y.double() - exact).abs().max() <= tolerance * exact.abs().max() + 1e-5


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_maps_are_standardized_along_dimension_one(kind: str, dtype: torch.dtype) -> None:
    standardizer = make_standardizer(kind, 12).partial_fit(rows(60, 12)).fit()
    features = rows(2 * 5 * 3, 12, seed=3).to(dtype).view(2, 5, 3, 12).permute(0, 3, 1, 2)
    mapped = standardizer.transform_map(features)
    assert mapped.is_contiguous()
    assert mapped.dtype == dtype
    torch.testing.assert_close(
        mapped, standardizer.transform(features.movedim(1, -1)).movedim(-1, 1)
    )


def test_autocast_does_not_lower_the_precision() -> None:
    standardizer = PhiS(12).partial_fit(rows(60, 12)).fit()
    x = rows(60, 12).float()
    features = x.T.reshape(1, 12, 6, 10)
    expected = standardizer.transform(x), standardizer.transform_map(features)
    with torch.autocast("cpu", torch.bfloat16):
        found = standardizer.transform(x), standardizer.transform_map(features)
    assert all(map(torch.equal, found, expected))


def test_first_use_in_inference_mode_does_not_forbid_gradients(tmp_path: Path) -> None:
    save_standardizers(tmp_path / "s", {"a": PhiS(4).partial_fit(rows(9, 4)).fit()}, {})
    with torch.inference_mode():
        standardizer = load_standardizers(tmp_path / "s")["a"]
        standardizer.transform(torch.zeros(1, 4))
    x = torch.ones(1, 4, requires_grad=True)
    standardizer.transform(x).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad[0], standardizer.matrix.sum(0).float())


# Refusals


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("kind", KINDS)
def test_nan_is_refused_by_the_teachers_name(kind: str, bad: float) -> None:
    x = rows(20, 6)
    x[3, 2] = bad
    standardizer = make_standardizer(kind, 6, "siglip").partial_fit(rows(20, 6))
    with pytest.raises(RadioError, match="'siglip' gave NaN or infinity"):
        standardizer.partial_fit(x)
    assert standardizer.count == 20


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "identity"])
@pytest.mark.parametrize(
    "use",
    [
        lambda s: s.transform(torch.zeros(2, 6)),
        lambda s: s.inverse_transform(torch.zeros(2, 6)),
        lambda s: s.transform_map(torch.zeros(2, 6, 1, 1)),
        lambda s: s.as_linear(),
        lambda s: s.matrix,
        lambda s: s.mean,
        lambda s: save_standardizers("unused", {"sam": s}, {}),
    ],
)
def test_use_before_fit_names_the_teacher_and_the_way_out(
    kind: str, use: Callable[[Standardizer], object]
) -> None:
    standardizer = make_standardizer(kind, 6, "sam").partial_fit(rows(20, 6))
    assert not standardizer.is_fitted
    with pytest.raises(RadioError, match="'sam' is not fitted; run: radio fit"):
        use(standardizer)


@pytest.mark.parametrize("n", [0, 1])
def test_too_few_rows_are_said(n: int) -> None:
    with pytest.raises(RadioError, match=rf"'sam' saw {n} positions.*raise fit.steps"):
        PhiS(6, "sam").partial_fit(rows(n, 6)).fit()


def test_other_channels_name_teacher_and_both_widths() -> None:
    standardizer = PhiS(24, "clip").partial_fit(rows(30, 24)).fit()
    expected = "teacher 'clip' has 12 channels but its standardizer was fitted on 24"
    with pytest.raises(RadioError, match=f"{expected}; run: radio fit"):
        standardizer.transform(torch.zeros(3, 12))
    with pytest.raises(RadioError, match=expected):
        standardizer.transform_map(torch.zeros(3, 12, 24, 24))
    with pytest.raises(RadioError, match=expected):
        standardizer.partial_fit(torch.zeros(3, 12))


def test_an_unknown_kind_lists_the_known_ones() -> None:
    with pytest.raises(RadioError, match=f"'phi' of teacher 'clip'; known: {', '.join(KINDS)}"):
        make_standardizer("phi", 4, "clip")


def test_only_alike_standardizers_merge() -> None:
    for other in (PhiS(5), PerChannel(4)):
        with pytest.raises(RadioError, match="cannot merge"):
            PhiS(4).merge(other)
