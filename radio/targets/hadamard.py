"""Hadamard matrices, and an exact equal-diagonal rotation where none can be built.

PHI-S (2410.01680) needs an orthogonal matrix that gives every channel the same variance. NVIDIA's
code falls back to a random rotation when it knows no Hadamard matrix, which silently loses that.
"""

from __future__ import annotations

import functools
import itertools

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from radio.errors import RadioError


def hadamard(n: int) -> Float[Tensor, "n n"]:
    """Return an n x n matrix of +1 and -1, float64, with H H^T = n I exactly.

    Built from Sylvester's doubling, Paley's constructions I and II over prime powers, and
    Kronecker products of whatever can be built; the same matrix every time, everywhere.

    Raises:
        RadioError: no matrix of this size can be built so; names the nearest sizes that can.

    Recipe: Hadamard matrices by Sylvester, Paley I and II; NVlabs/RADIO
    examples/common/hadamard.py; teachers.*.standardizer=phi_s, teachers.*.standardizer=hadamard;
    tests/test_hadamard.py::test_every_matrix_that_can_be_built_is_hadamard.
    Recipe: Paley's constructions over prime powers; ours; teachers.*.standardizer=phi_s,
    teachers.*.standardizer=hadamard;
    tests/test_hadamard.py::test_prime_powers_are_used_where_no_prime_serves.
    """
    if not can_build(n):
        smaller = next((m for m in range(n - 1, 0, -1) if can_build(m)), None)
        larger = next(m for m in itertools.count(max(n + 1, 1)) if can_build(m))
        near = f"{smaller} and {larger}" if smaller else f"{larger}"
        raise RadioError(
            f"no Hadamard matrix of size {n} can be built; the nearest sizes that can: {near} "
            "(equal_diagonal_rotation takes any size)"
        )
    return torch.from_numpy(_build(n).astype(np.float64))


@functools.cache
def can_build(n: int) -> bool:
    """Return whether `hadamard(n)` can be built here (which is less than whether it exists)."""
    if n in (1, 2):
        return True
    if n < 4 or n % 4:
        return False
    return _is_paley_1(n) or _is_paley_2(n) or _factors(n) is not None


def equal_diagonal_rotation(cov: Float[Tensor, "n n"]) -> Float[Tensor, "n n"]:
    """Return an orthogonal R with R cov R^T of constant diagonal, float64.

    Schur-Horn by at most n - 1 Givens rotations: each turns the smallest remaining variance
    against the largest until the smaller one is the mean, where it stays. O(n^2) in all.

    Args:
        cov: symmetric; the mean of its diagonal is what every channel gets.

    Raises:
        RadioError: cov is no square matrix of finite numbers.

    Recipe: equal-diagonal rotation where there is no Hadamard matrix; ours;
    teachers.*.standardizer=phi_s, teachers.*.standardizer=hadamard;
    tests/test_hadamard.py::test_a_rotation_gives_every_channel_the_mean_variance.
    """
    if cov.ndim != 2 or cov.shape[0] != cov.shape[1] or not bool(torch.isfinite(cov).all()):
        raise RadioError(
            f"an equal-diagonal rotation needs a square covariance of finite numbers, "
            f"not one of shape {tuple(cov.shape)} or with NaN"
        )
    moved = cov.detach().to("cpu", torch.float64, copy=True).numpy()
    rotation = np.eye(len(moved))
    mean = moved.diagonal().mean()
    above = moved.diagonal() - mean  # of the channels that are not at the mean yet
    low, high = int(above.argmin()), int(above.argmax())
    while above[low] < 0 < above[high]:
        cosine, sine = _givens(above[low], moved[low, high], above[high])
        turn = np.array([[cosine, sine], [-sine, cosine]])
        pair = [low, high]
        moved[pair] = turn @ moved[pair]
        moved[:, pair] = moved[:, pair] @ turn.T
        rotation[pair] = turn @ rotation[pair]
        above[low] = 0
        above[high] = moved[high, high] - mean
        low, high = int(above.argmin()), int(above.argmax())
    return torch.from_numpy(rotation)


def _givens(below: float, between: float, above: float) -> tuple[float, float]:
    """Return (cosine, sine) of the smaller angle that brings a variance to the mean.

    With x = tan(angle), the variance's distance from the mean after the turn is zero where
    below + 2 between x + above x^2 = 0; below < 0 < above, so there are two roots, q / above and
    below / q, of which the second is never the larger.
    """
    root = np.hypot(between, np.sqrt(-below) * np.sqrt(above))
    q = -(between + np.copysign(root, between))  # no cancellation
    x = below / q
    cosine = 1 / np.hypot(1, x)
    return float(cosine), float(x * cosine)


def _build(n: int) -> np.ndarray:
    if n == 1:
        return np.ones((1, 1), dtype=np.int8)
    if n == 2:
        return np.array([[1, 1], [1, -1]], dtype=np.int8)
    if _is_paley_1(n):
        return _paley_1(n)
    if _is_paley_2(n):
        return _paley_2(n)
    factors = _factors(n)
    assert factors is not None, "can_build said that it can"
    return np.kron(_build(factors[0]), _build(factors[1]))


@functools.cache
def _factors(n: int) -> tuple[int, int] | None:
    """Return a <= b with a * b = n of which both can be built, the smallest a first."""
    for a in range(2, int(n**0.5) + 1):
        if n % a == 0 and can_build(a) and can_build(n // a):
            return a, n // a
    return None


def _is_paley_1(n: int) -> bool:
    return (n - 1) % 4 == 3 and _prime_power(n - 1) is not None


def _is_paley_2(n: int) -> bool:
    return n % 2 == 0 and (n // 2 - 1) % 4 == 1 and _prime_power(n // 2 - 1) is not None


def _paley_1(n: int) -> np.ndarray:
    """I + S, S = [[0, 1], [-1, Q]], q = n - 1 = 3 mod 4 (where Q is skew)."""
    matrix = np.ones((n, n), dtype=np.int8)
    matrix[1:, 0] = -1
    matrix[1:, 1:] = _jacobsthal(n - 1) + np.eye(n - 1, dtype=np.int8)
    return matrix


def _paley_2(n: int) -> np.ndarray:
    """C x [[1, 1], [1, -1]] + I x [[1, -1], [-1, -1]], C = [[0, 1], [1, Q]], q = n/2 - 1."""
    half = n // 2
    conference = np.ones((half, half), dtype=np.int8)
    conference[0, 0] = 0
    conference[1:, 1:] = _jacobsthal(half - 1)
    plus = np.array([[1, 1], [1, -1]], dtype=np.int8)
    minus = np.array([[1, -1], [-1, -1]], dtype=np.int8)
    product: np.ndarray = np.kron(conference, plus) + np.kron(np.eye(half, dtype=np.int8), minus)
    return product


def _jacobsthal(q: int) -> np.ndarray:
    """Q[a, b] = chi(a - b), the quadratic character of the field of q elements.

    chi is 0 at zero, 1 at the other squares and -1 elsewhere. An element's number reads its
    coefficients as digits to the base p, so zero is number 0.
    """
    power = _prime_power(q)
    assert power is not None
    p, k = power
    digits = np.arange(q)[:, None] // p ** np.arange(k) % p
    modulus = _irreducible(p, k)
    elements = [tuple(row) for row in digits.tolist()]
    squares = {sum(c * p**i for i, c in enumerate(_multiply(a, a, p, modulus))) for a in elements}
    character = np.full(q, -1, dtype=np.int8)
    character[list(squares)] = 1
    character[0] = 0
    differences = ((digits[a] - digits) % p @ p ** np.arange(k) for a in range(q))
    return np.stack([character[row] for row in differences])


def _multiply(
    a: tuple[int, ...], b: tuple[int, ...], p: int, modulus: tuple[int, ...]
) -> tuple[int, ...]:
    """Multiply two elements of F_p[x] / modulus (monic, constant term first)."""
    k = len(modulus) - 1
    product = [0] * (2 * k - 1)
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            product[i + j] += x * y
    return tuple(_remainder(product, modulus, p))


def _remainder(poly: list[int], modulus: tuple[int, ...], p: int) -> list[int]:
    """Return the remainder of a polynomial over F_p by a monic one, constant term first."""
    k = len(modulus) - 1
    rest = [value % p for value in poly]
    for top in range(len(rest) - 1, k - 1, -1):
        factor = rest[top]
        for shift, value in enumerate(modulus):
            rest[top - k + shift] = (rest[top - k + shift] - factor * value) % p
    return rest[:k]


@functools.cache
def _irreducible(p: int, k: int) -> tuple[int, ...]:
    """Return the first monic polynomial of degree k over F_p without a factor of degree <= k/2."""
    divisors = [
        (*low, 1)
        for degree in range(1, k // 2 + 1)
        for low in itertools.product(range(p), repeat=degree)
    ]
    for low in itertools.product(range(p), repeat=k):
        candidate = (*low, 1)
        if all(any(_remainder(list(candidate), divisor, p)) for divisor in divisors):
            return candidate
    raise AssertionError("a field of every prime power exists")


@functools.cache
def _prime_power(q: int) -> tuple[int, int] | None:
    """Return (p, k) with q = p^k and p prime, or None."""
    if q < 2:
        return None
    p = next((d for d in range(2, int(q**0.5) + 1) if q % d == 0), q)
    k = 0
    while q % p == 0:
        q //= p
        k += 1
    return (p, k) if q == 1 else None
