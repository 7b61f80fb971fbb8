"""Hadamard matrices against their definition, and the rotation that stands in for them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from radio import RadioError
from radio.targets.hadamard import can_build, equal_diagonal_rotation, hadamard

WIDTHS = (12, 192, 384, 768, 1024, 1152, 1280, 1408, 1536)


def is_hadamard(matrix: Tensor) -> bool:
    n = len(matrix)
    identity = torch.eye(n, dtype=torch.float64)
    return bool((matrix.abs() == 1).all()) and torch.equal(matrix @ matrix.T, n * identity)


@pytest.mark.parametrize("n", [n for n in range(1, 401) if can_build(n)])
def test_every_matrix_that_can_be_built_is_hadamard(n: int) -> None:
    matrix = hadamard(n)
    assert matrix.dtype == torch.float64
    assert matrix.shape == (n, n)
    assert is_hadamard(matrix)


@pytest.mark.parametrize("n", WIDTHS)
def test_the_widths_of_known_teachers_can_be_built(n: int) -> None:
    assert is_hadamard(hadamard(n))


@pytest.mark.parametrize(
    ("n", "field"),
    [(28, "27 = 3^3"), (244, "243 = 3^5"), (52, "25 = 5^2"), (100, "49 = 7^2"), (164, "81 = 3^4")],
)
def test_prime_powers_are_used_where_no_prime_serves(n: int, field: str) -> None:
    assert is_hadamard(hadamard(n)), field


@pytest.mark.slow
def test_a_large_prime_power_is_hadamard() -> None:
    assert is_hadamard(hadamard(1332))  # 1331 = 11^3
    assert is_hadamard(hadamard(2188))  # 2187 = 3^7


def test_the_sizes_below_400_that_cannot_be_built_are_the_known_ones() -> None:
    """What Sylvester, Paley and Kronecker products leave open is tabulated: the first is 92."""
    missing = [n for n in range(4, 400, 4) if not can_build(n)]
    assert missing == [
        *(92, 116, 156, 172, 184, 188, 232, 236, 260, 268, 292, 324, 356, 372, 376),
    ]


@pytest.mark.parametrize(
    ("n", "near"), [(5, "4 and 8"), (92, "88 and 96"), (668, "664 and 672"), (770, "768 and 776")]
)
def test_a_size_that_cannot_be_built_names_the_nearest_that_can(n: int, near: str) -> None:
    with pytest.raises(ValueError, match=near) as caught:
        hadamard(n)
    assert isinstance(caught.value, RadioError)
    assert all(can_build(int(size)) for size in near.split(" and "))
    low, high = map(int, near.split(" and "))
    assert not any(can_build(size) for size in range(low + 1, high))


@pytest.mark.parametrize("n", [0, -4])
def test_no_size_below_one_is_built(n: int) -> None:
    with pytest.raises(RadioError, match="that can: 1 "):
        hadamard(n)


def test_a_matrix_is_the_same_every_time_and_its_own() -> None:
    first = hadamard(36)
    first[0, 0] = 5
    assert is_hadamard(hadamard(36))


def rotated_diagonal(rotation: Tensor, cov: Tensor) -> Tensor:
    return ((rotation @ cov) * rotation).sum(1)


def covariance(n: int, decades: float, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    basis, _ = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))
    values = 10 ** (decades * torch.rand(n, generator=generator, dtype=torch.float64))
    cov = (basis * values) @ basis.T
    return (cov + cov.T) / 2


@settings(deadline=None, max_examples=60)
@given(n=st.integers(1, 40), decades=st.floats(0, 12), seed=st.integers(0, 2**32))
def test_a_rotation_gives_every_channel_the_mean_variance(
    n: int, decades: float, seed: int
) -> None:
    cov = covariance(n, decades, seed)
    rotation = equal_diagonal_rotation(cov)
    identity = torch.eye(n, dtype=torch.float64)
    assert (rotation @ rotation.T - identity).abs().max() < 1e-12
    mean = cov.diagonal().mean()
    assert (rotated_diagonal(rotation, cov) / mean - 1).abs().max() < 1e-12


@pytest.mark.parametrize("n", [92, 668, 770, 4304])
def test_wide_spectra_are_levelled_too(n: int) -> None:
    values = 10 ** torch.linspace(-8, 4, n, dtype=torch.float64)
    rotation = equal_diagonal_rotation(torch.diag(values))
    levelled = (rotation.square() @ values) / values.mean()
    assert (levelled - 1).abs().max() < 5e-12
    norms = rotation.square().sum(1)
    assert (norms - 1).abs().max() < 1e-12


def test_a_rotation_takes_low_rank_and_keeps_its_argument() -> None:
    cov = torch.zeros(9, 9, dtype=torch.float64)
    cov[3, 3] = 18.0
    before = cov.clone()
    rotation = equal_diagonal_rotation(cov)
    torch.testing.assert_close(
        rotated_diagonal(rotation, cov), torch.full((9,), 2.0, dtype=torch.float64)
    )
    assert torch.equal(cov, before)
    assert torch.equal(rotation, equal_diagonal_rotation(cov))


def test_what_is_level_already_is_not_turned() -> None:
    assert torch.equal(
        equal_diagonal_rotation(torch.zeros(5, 5)), torch.eye(5, dtype=torch.float64)
    )


@pytest.mark.parametrize(
    "cov", [torch.full((3, 3), float("nan")), torch.diag(torch.tensor([1e400, 1]))]
)
def test_a_rotation_refuses_what_is_not_finite(cov: Tensor) -> None:
    with pytest.raises(RadioError, match="finite"):
        equal_diagonal_rotation(cov)
