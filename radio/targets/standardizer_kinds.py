"""One short function per kind of standardizer: from a covariance to W and its inverse.

With covariance Sigma = U L U^T and phi = sqrt(mean L) (PHI-S 2410.01680, eq. 21-26).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from radio.targets.hadamard import can_build, equal_diagonal_rotation, hadamard

# The smallest phi (root mean variance), so that a wholly constant teacher divides by something;
# the smallest known teacher, DFN CLIP, has 0.03.
PHI_FLOOR = 1e-8
# No channel's standard deviation is taken smaller than this share of phi.
CHANNEL_FLOOR = 1e-6
# No principal direction's standard deviation is taken smaller than this share of phi: eigenvalues
# of missing rank are rounding noise, which whitening would otherwise blow up, and the inverse
# would lose its digits (with this floor it keeps 9 of them in float64).
WHITENING_FLOOR = 1e-5

Matrix = Float[Tensor, "c c"]
Maps = tuple[Matrix, Matrix]  # W and its inverse


def _eigen(covariance: Matrix) -> tuple[Tensor, Matrix, float]:
    """Return eigenvalues (clipped at 0), canonical eigenvectors in columns, and phi.

    An eigenvector's largest entry is positive, the first of them on ties.
    """
    values, vectors = torch.linalg.eigh(covariance)
    values = values.clamp_min(0)
    largest = vectors.abs().argmax(0)
    signs = vectors.gather(0, largest[None]).sign()
    return values, vectors * signs, max(float(values.mean().sqrt()), PHI_FLOOR)


def _rotation(values: Tensor) -> Matrix:
    """Return an orthogonal matrix that spreads the eigenvalues evenly over all channels."""
    n = len(values)
    if can_build(n):
        return hadamard(n) / math.sqrt(n)
    return equal_diagonal_rotation(torch.diag(values))


def _phi_s(covariance: Matrix) -> Maps:
    """phi^-1 H U^T.

    Recipe: PHI standardization; PHI-S (2410.01680) eq. 21-26; teachers.*.standardizer=phi_s;
    tests/test_standardizer_kinds.py::test_phi_s_is_a_rotation_by_one_scalar.
    """
    values, vectors, phi = _eigen(covariance)
    rotation = _rotation(values) @ vectors.T
    return rotation / phi, rotation.T * phi


def _global_scale(covariance: Matrix) -> Maps:
    """phi^-1 I.

    Recipe: global scale; PHI-S (2410.01680) table 13; teachers.*.standardizer=global_scale;
    tests/test_standardizer_kinds.py::test_global_scale_makes_the_mean_variance_one.
    """
    phi = max(float(covariance.diagonal().mean().sqrt()), PHI_FLOOR)
    eye = torch.eye(len(covariance), dtype=torch.float64)
    return eye / phi, eye * phi


def _per_channel(covariance: Matrix) -> Maps:
    """diag(Sigma)^-1/2.

    Recipe: scale of each channel; PHI-S (2410.01680) table 13; teachers.*.standardizer=per_channel;
    tests/test_standardizer_kinds.py::test_per_channel_agrees_with_scikit_learn.
    """
    variances = covariance.diagonal()
    phi = max(float(variances.mean().sqrt()), PHI_FLOOR)
    deviations = variances.sqrt().clamp_min(CHANNEL_FLOOR * phi)
    return torch.diag(1 / deviations), torch.diag(deviations)


def _whitening(covariance: Matrix, turn: Callable[[Tensor, Matrix], Matrix]) -> Maps:
    """R L^-1/2 U^T, with R = turn(eigenvalues, U) orthogonal."""
    values, vectors, phi = _eigen(covariance)
    deviations = values.sqrt().clamp_min(WHITENING_FLOOR * phi)
    left = turn(values, vectors)
    return left @ (vectors / deviations).T, (vectors * deviations) @ left.T


def _pca(covariance: Matrix) -> Maps:
    """L^-1/2 U^T.

    Recipe: PCA whitening; PHI-S (2410.01680) table 13; teachers.*.standardizer=pca;
    tests/test_standardizer_kinds.py::test_pca_whitening_agrees_with_scikit_learn.
    """
    return _whitening(covariance, lambda values, _: torch.eye(len(values), dtype=torch.float64))


def _zca(covariance: Matrix) -> Maps:
    """U L^-1/2 U^T.

    Recipe: ZCA whitening; PHI-S (2410.01680) table 13; teachers.*.standardizer=zca;
    tests/test_standardizer_kinds.py::test_zca_is_the_symmetric_whitening.
    """
    return _whitening(covariance, lambda _, vectors: vectors)


def _hadamard(covariance: Matrix) -> Maps:
    """H L^-1/2 U^T: an error in any whitened channel costs the same in y.

    Recipe: Hadamard whitening; PHI-S (2410.01680) table 13; teachers.*.standardizer=hadamard;
    tests/test_standardizer_kinds.py::test_hadamard_whitening_spreads_errors_evenly.
    """
    return _whitening(covariance, lambda values, _: _rotation(values))


def _identity(covariance: Matrix) -> Maps:
    """I.

    Recipe: no standardization (plain MSE); PHI-S (2410.01680) table 13;
    teachers.*.standardizer=identity;
    tests/test_standardizer_kinds.py::test_identity_changes_nothing_and_needs_no_fit.
    """
    eye = torch.eye(len(covariance), dtype=torch.float64)
    return eye, eye.clone()


STANDARDIZERS: dict[str, Callable[[Matrix], Maps]] = {
    "phi_s": _phi_s,
    "global_scale": _global_scale,
    "per_channel": _per_channel,
    "pca": _pca,
    "zca": _zca,
    "hadamard": _hadamard,
    "identity": _identity,
}
