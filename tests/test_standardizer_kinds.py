"""What each kind of standardizer promises, by float64 oracles and scikit-learn."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA
from sklearn.preprocessing import StandardScaler
from test_standardize import KINDS, covariance, rows, variances
from torch import Tensor

import radio
from radio.targets.standardize import (
    Identity,
    PcaWhitening,
    PerChannel,
    PhiS,
    Standardizer,
    make_standardizer,
)
from radio.targets.standardizer_kinds import CHANNEL_FLOOR, PHI_FLOOR

WHITENINGS = ("pca", "zca", "hadamard")


# What each kind is


@pytest.mark.parametrize("c", [12, 92, 31])
def test_phi_s_is_a_rotation_by_one_scalar(c: int) -> None:
    x = rows(400, c)
    standardizer = PhiS(c).partial_fit(x).fit()
    sigma = covariance(x)
    phi = np.sqrt(np.linalg.eigvalsh(sigma).mean())
    matrix = standardizer.matrix.numpy()
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(c) / phi**2, atol=1e-12 / phi**2)
    np.testing.assert_allclose(np.diag(matrix @ sigma @ matrix.T), np.ones(c), rtol=1e-10)
    np.testing.assert_allclose(standardizer.mean, x.mean(0), rtol=1e-12)


def test_phi_s_turns_principal_directions_by_a_hadamard_matrix() -> None:
    x = rows(500, 12)
    matrix = PhiS(12).partial_fit(x).fit().matrix.numpy()
    values, vectors = np.linalg.eigh(covariance(x))
    turned = matrix @ vectors * np.sqrt(values.mean() * 12)  # H, up to the signs of its columns
    np.testing.assert_allclose(np.abs(turned), np.ones((12, 12)), atol=1e-9)


@pytest.mark.parametrize("kind", WHITENINGS)
@pytest.mark.parametrize("c", [12, 92, 31])
def test_whitened_covariance_is_identity(kind: str, c: int) -> None:
    x = rows(6 * c, c)
    y = make_standardizer(kind, c).partial_fit(x).fit().transform(x)
    np.testing.assert_allclose(covariance(y), np.eye(c), atol=1e-8)


def test_zca_is_the_symmetric_whitening() -> None:
    matrix = make_standardizer("zca", 9).partial_fit(rows(90, 9)).fit().matrix
    torch.testing.assert_close(matrix, matrix.T)
    assert torch.linalg.eigvalsh(matrix).min() > 0


@pytest.mark.parametrize("c", [12, 31])
def test_hadamard_whitening_spreads_errors_evenly(c: int) -> None:
    """An error in any whitened channel costs the same in the teacher's space."""
    x = rows(300, c)
    cost = make_standardizer("hadamard", c).partial_fit(x).fit().inverse.square().sum(0)
    torch.testing.assert_close(cost, cost.mean().expand(c))
    uneven = PcaWhitening(c).partial_fit(x).fit().inverse.square().sum(0)
    assert uneven.max() > 10 * uneven.min()


def test_pca_whitening_agrees_with_scikit_learn() -> None:
    x = rows(200, 10)
    ours = PcaWhitening(10).partial_fit(x).fit().transform(x).numpy()
    theirs = PCA(whiten=True, svd_solver="full").fit_transform(x.numpy())[:, ::-1]
    theirs = theirs * np.sqrt(200 / 199)  # theirs divides by n - 1
    signs = np.sign((ours * theirs).sum(0))
    np.testing.assert_allclose(ours, theirs * signs, rtol=1e-7, atol=1e-7)


def test_per_channel_agrees_with_scikit_learn() -> None:
    x = rows(200, 10)
    ours = PerChannel(10).partial_fit(x).fit().transform(x)
    np.testing.assert_allclose(ours, StandardScaler().fit_transform(x.numpy()), rtol=1e-9)


def test_global_scale_makes_the_mean_variance_one() -> None:
    x = rows(200, 10)
    standardizer = make_standardizer("global_scale", 10).partial_fit(x).fit()
    y = standardizer.transform(x)
    torch.testing.assert_close(variances(y).mean(), torch.tensor(1.0, dtype=torch.float64))
    torch.testing.assert_close(variances(y) / variances(y)[0], variances(x) / variances(x)[0])


def test_identity_changes_nothing_and_needs_no_fit() -> None:
    x = rows(20, 6).float()
    x[0, 0] = float("inf")
    standardizer = Identity(6, "clip")
    assert standardizer.is_fitted
    assert torch.equal(standardizer.transform(x), x)
    standardizer.partial_fit(rows(20, 6)).fit()
    assert torch.equal(standardizer.transform(x), x)
    assert torch.equal(standardizer.inverse_transform(x), x)


@pytest.mark.parametrize("kind", ["phi_s", "pca"])
def test_eigenvector_signs_do_not_depend_on_the_solver(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = rows(300, 12)
    expected = make_standardizer(kind, 12).partial_fit(x).fit().matrix
    eigh = torch.linalg.eigh

    def other_signs(matrix: Tensor) -> tuple[Tensor, Tensor]:
        values, vectors = eigh(matrix)
        return values, vectors * torch.tensor([-1.0, 1.0] * 6, dtype=torch.float64)

    monkeypatch.setattr(torch.linalg, "eigh", other_signs)
    assert torch.equal(make_standardizer(kind, 12).partial_fit(x).fit().matrix, expected)


@pytest.mark.parametrize(
    ("constructor", "kind"),
    [
        (radio.PhiS, "phi_s"),
        (radio.GlobalScale, "global_scale"),
        (radio.PerChannel, "per_channel"),
        (radio.PcaWhitening, "pca"),
        (radio.ZcaWhitening, "zca"),
        (radio.HadamardWhitening, "hadamard"),
        (radio.Identity, "identity"),
    ],
)
def test_every_kind_has_a_public_constructor(
    constructor: Callable[..., Standardizer], kind: str
) -> None:
    made = constructor(8, name="sam")
    assert isinstance(made, radio.Standardizer)
    assert (made.kind, made.num_channels, made.name) == (kind, 8, "sam")
    assert constructor.__doc__
    assert kind in KINDS


# Constant channels and missing rank


@pytest.mark.parametrize("kind", KINDS)
def test_constant_channels_stay_finite(kind: str) -> None:
    x = rows(100, 12)
    x[:, [2, 7]] = 0.1
    standardizer = make_standardizer(kind, 12).partial_fit(x).fit()
    for dtype in (torch.float32, torch.float64):
        y = standardizer.transform(x.to(dtype))
        assert torch.isfinite(y).all()
        assert y.abs().max() < 100
        back = standardizer.inverse_transform(y)
        assert (back - x.to(dtype)).abs().max() < 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_a_wholly_constant_teacher_stays_finite(kind: str) -> None:
    x = torch.full((50, 12), 0.3)
    standardizer = make_standardizer(kind, 12).partial_fit(x).fit()
    y = standardizer.transform(x)
    assert torch.isfinite(y).all()
    torch.testing.assert_close(standardizer.inverse_transform(y), x)


def test_the_stated_floors_hold() -> None:
    x = torch.zeros(10, 2, dtype=torch.float64)
    x[:5, 0] = 2.0
    deviations = PerChannel(2).partial_fit(x).fit().inverse.diagonal()
    phi = 0.5**0.5  # variances 1 and 0
    torch.testing.assert_close(
        deviations, torch.tensor([1.0, CHANNEL_FLOOR * phi], dtype=torch.float64)
    )
    flat = PhiS(2).partial_fit(torch.zeros(10, 2)).fit()
    norms = flat.inverse.square().sum(0).sqrt()
    torch.testing.assert_close(norms, torch.full((2,), PHI_FLOOR, dtype=torch.float64))


@pytest.mark.parametrize("c", [24, 23])
def test_phi_s_gives_variance_one_at_any_rank(c: int) -> None:
    x = rows(100, c, rank=3)
    y = PhiS(c).partial_fit(x).fit().transform(x)
    assert (variances(y) - 1).abs().max() < 1e-9


def test_fewer_rows_than_channels_are_enough() -> None:
    x = rows(5, 48)
    y = PhiS(48).partial_fit(x).fit().transform(x)
    assert (variances(y) - 1).abs().max() < 1e-9
