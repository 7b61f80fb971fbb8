"""Standardizers: fitted affine maps of a teacher's features, PHI-S above all.

One class holds the statistics and the map; a function per kind (standardizer_kinds.py) turns a
covariance into the forward matrix W and its inverse: y' = W (y - mu), y = W^-1 y' + mu. With
covariance Sigma = U L U^T, PHI-S (2410.01680, eq. 21-26) is W = phi^-1 H U^T, phi = sqrt(mean L):
every channel gets variance 1 by one scalar, so that MSE in y' is MSE in y up to phi^2.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from radio.errors import RadioError
from radio.targets.standardizer_file import read_file, read_header, write_file
from radio.targets.standardizer_kinds import STANDARDIZERS

__all__ = [
    "STANDARDIZERS",
    "GlobalScale",
    "HadamardWhitening",
    "Identity",
    "PcaWhitening",
    "PerChannel",
    "PhiS",
    "Standardizer",
    "ZcaWhitening",
    "load_standardizers",
    "make_standardizer",
    "read_metadata",
    "save_standardizers",
]

Matrix = Float[Tensor, "c c"]


class Standardizer:
    """Gather mean and covariance in float64, fit an affine map, apply it.

    The map changes in `fit` only: rows added later count from the next `fit` on.

    Args:
        kind: a row of STANDARDIZERS.
        num_channels: channels of the teacher's features.
        name: the teacher, named in errors.
    """

    def __init__(self, kind: str, num_channels: int, name: str = "") -> None:
        if kind not in STANDARDIZERS:
            known = ", ".join(STANDARDIZERS)
            raise RadioError(f"unknown standardizer '{kind}' of teacher '{name}'; known: {known}")
        if num_channels < 1:
            raise RadioError(f"teacher '{name}' has {num_channels} channels; at least 1 is needed")
        self.kind = kind
        self.num_channels = num_channels
        self.name = name
        self.count = 0
        zeros = torch.zeros(num_channels, num_channels, dtype=torch.float64)
        self._moments: tuple[Tensor, Tensor] | None = (zeros[0].clone(), zeros)  # mean, scatter
        self._map: _Map | None = None
        self._cast: dict[tuple[torch.dtype, torch.device], _Map] = {}
        if kind == "identity":
            self.fit()  # it has nothing to learn

    def __repr__(self) -> str:
        state = f"fitted on {self.count} positions" if self.is_fitted else "not fitted"
        return f"Standardizer({self.kind}, '{self.name}', {self.num_channels} channels, {state})"

    @property
    def is_fitted(self) -> bool:
        """Whether there is a map to apply (Identity always has one)."""
        return self._map is not None

    @property
    def mean(self) -> Float[Tensor, " c"]:
        """The fitted mean mu, float64; zero for Identity."""
        return self._fitted().mean

    @property
    def matrix(self) -> Matrix:
        """The fitted forward matrix W, float64: y' = (y - mu) @ W.T."""
        return self._fitted().matrix

    @property
    def inverse(self) -> Matrix:
        """The inverse of `matrix`, float64."""
        return self._fitted().inverse

    def partial_fit(self, x: Float[Tensor, "n c"]) -> Standardizer:
        """Add rows to the statistics, in float64, and return self.

        Raises:
            RadioError: NaN or infinity, or another number of channels; names the teacher.
        """
        self._check_channels(x.shape[-1])
        rows = x.detach().to("cpu", torch.float64)
        if not bool(torch.isfinite(rows).all()):
            raise RadioError(
                f"teacher '{self.name}' gave NaN or infinity, on which nothing can be fitted; check"
                " its weights and precision (norms must stay float32)"
            )
        mean = rows.mean(0)
        centred = rows - mean
        return self._merge(len(rows), mean, centred.T @ centred)

    def merge(self, other: Standardizer) -> Standardizer:
        """Add another standardizer's statistics and return self; `other` stays as it is.

        Raises:
            RadioError: another kind or number of channels, or one of the two came from a file.

        Recipe: statistics merged by Chan's rule in float64; NVlabs/FeatSharp; fit.steps;
        tests/test_standardize.py::test_statistics_do_not_depend_on_how_rows_arrive.
        """
        if (other.kind, other.num_channels) != (self.kind, self.num_channels):
            raise RadioError(
                f"cannot merge {other.kind} of {other.num_channels} channels (teacher "
                f"'{other.name}') into {self.kind} of {self.num_channels} (teacher '{self.name}')"
            )
        return self._merge(other.count, *other._statistics())

    def _merge(self, count: int, mean: Tensor, scatter: Tensor) -> Standardizer:
        """Chan's rule: the scatters add, and so does that of the two means."""
        own_mean, own_scatter = self._statistics()
        if count:
            total = self.count + count
            delta = mean - own_mean
            between = torch.outer(delta, delta) * (self.count * count / total)
            self._moments = own_mean + delta * (count / total), own_scatter + scatter + between
            self.count = total
        return self

    def fit(self) -> Standardizer:
        """Compute the map from the statistics and return self.

        The covariance is that of the rows seen, divided by their number n (not n - 1).
        Eigenvector signs are canonical, but eigh differs between machines in the last bits: fit
        once and share the file. Where a kind divides by their own standard deviation, constant
        channels take 1e-6 phi (CHANNEL_FLOOR) and directions of missing rank 1e-5 phi
        (WHITENING_FLOOR); a teacher that is constant everywhere takes 1e-8 for phi (PHI_FLOOR).

        Raises:
            RadioError: fewer than 2 rows were seen.
        """
        mean, scatter = self._statistics()
        if self.kind == "identity":
            mean = torch.zeros_like(mean)
        elif self.count < 2:
            raise RadioError(
                f"the standardizer of teacher '{self.name}' saw {self.count} positions and needs "
                "at least 2; raise fit.steps"
            )
        self._set(_Map(mean, *STANDARDIZERS[self.kind](scatter / max(self.count, 1))))
        return self

    def transform(self, x: Float[Tensor, "*batch c"]) -> Float[Tensor, "*batch c"]:
        """Return y' = W (y - mu), keeping dtype and device.

        float64 is computed in float64, all else in float32, under autocast too.

        Raises:
            RadioError: not fitted, or fitted on another number of channels; names the teacher.
        """
        cast = self._cast_for(x, x.shape[-1:])
        return _multiply(x.to(cast.mean.dtype) - cast.mean, cast.matrix).to(x.dtype)

    def inverse_transform(self, y: Float[Tensor, "*batch c"]) -> Float[Tensor, "*batch c"]:
        """Return y = W^-1 y' + mu, keeping dtype and device, with the precision of `transform`."""
        cast = self._cast_for(y, y.shape[-1:])
        return (_multiply(y.to(cast.mean.dtype), cast.inverse) + cast.mean).to(y.dtype)

    def transform_map(self, features: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """Return `transform` of features whose channels are dimension 1, contiguous."""
        cast = self._cast_for(features, features.shape[1:2])
        centred = features.flatten(2).to(cast.mean.dtype) - cast.mean[:, None]
        mapped = _multiply_left(cast.matrix, centred).to(features.dtype)
        return mapped.contiguous().view(features.shape)

    def as_linear(self) -> tuple[Float[Tensor, "c c"], Float[Tensor, " c"]]:
        """Return (weight, bias) of the inverse, float64: y = y' @ weight.T + bias."""
        fitted = self._fitted()
        return fitted.inverse, fitted.mean

    def state_dict(self) -> dict[str, Tensor]:
        """Return what there is of statistics and map, float64, for `load_state_dict`."""
        state = {"count": torch.tensor(self.count)}
        if self._moments is not None:
            state |= {"sample_mean": self._moments[0], "scatter": self._moments[1]}
        if self._map is not None:
            state |= self._map._asdict()
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> Standardizer:
        """Become what `state_dict` was taken of and return self.

        Raises:
            RadioError: entries are missing, or are of another number of channels.
        """
        c = self.num_channels
        shapes = {"mean": (c,), "matrix": (c, c), "inverse": (c, c)}
        shapes |= {"sample_mean": (c,), "scatter": (c, c)}
        whole = {"mean", "matrix", "inverse"} <= set(state)
        has_moments = {"sample_mean", "scatter"} <= set(state)
        wrong = [k for k, v in state.items() if k != "count" and tuple(v.shape) != shapes.get(k)]
        if wrong or "count" not in state or not (whole or has_moments):
            found = ", ".join(f"{key} {tuple(value.shape)}" for key, value in state.items())
            raise RadioError(
                f"a state of [{found}] does not fit the standardizer of teacher '{self.name}' with "
                f"{c} channels; run: radio fit"
            )
        own = {key: value.detach().to("cpu", torch.float64) for key, value in state.items()}
        self.count = int(state["count"])
        self._moments = (own["sample_mean"], own["scatter"]) if has_moments else None
        self._map = None
        if whole:
            self._set(_Map(own["mean"], own["matrix"], own["inverse"]))
        return self

    def _set(self, fitted: _Map) -> None:
        self._map = _Map(*(tensor.contiguous() for tensor in fitted))
        self._cast.clear()

    def _cast_for(self, x: Tensor, channels: torch.Size) -> _Map:
        """Return the map in the precision and place of x, a diagonal matrix as its diagonal."""
        self._check_channels(*channels)
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        key = (dtype, x.device)
        if key not in self._cast:
            fitted = self._fitted()
            diagonal = bool((fitted.matrix == fitted.matrix.diagonal().diag()).all())
            parts = [fitted.mean, fitted.matrix, fitted.inverse]
            if diagonal:
                parts[1:] = [part.diagonal() for part in parts[1:]]
            # Made in inference mode they could not take part in a later backward.
            with torch.inference_mode(False):
                self._cast[key] = _Map(*(part.to(x.device, dtype, copy=True) for part in parts))
        return self._cast[key]

    def _fitted(self) -> _Map:
        if self._map is None:
            raise RadioError(
                f"the standardizer of teacher '{self.name}' is not fitted; run: radio fit "
                "(or partial_fit and fit it)"
            )
        return self._map

    def _statistics(self) -> tuple[Tensor, Tensor]:
        if self._moments is None:
            raise RadioError(
                f"the standardizer of teacher '{self.name}' came from a file, which holds no "
                "statistics to add to; fit a new one"
            )
        return self._moments

    def _check_channels(self, found: int) -> None:
        if found != self.num_channels:
            raise RadioError(
                f"teacher '{self.name}' has {found} channels but its standardizer was fitted on "
                f"{self.num_channels}; run: radio fit"
            )


class _Map(NamedTuple):
    """y' = matrix (y - mean), y = inverse y' + mean; [c] for [c, c] stands for a diagonal."""

    mean: Tensor
    matrix: Tensor
    inverse: Tensor


def _multiply(x: Tensor, matrix: Tensor) -> Tensor:
    if matrix.ndim == 1:
        return x * matrix
    with torch.autocast(x.device.type, enabled=False):
        return x @ matrix.T


def _multiply_left(matrix: Tensor, x: Tensor) -> Tensor:
    if matrix.ndim == 1:
        return matrix[:, None] * x
    with torch.autocast(x.device.type, enabled=False):
        return matrix @ x


def make_standardizer(kind: str, num_channels: int, name: str = "") -> Standardizer:
    """Return an unfitted standardizer of a kind in STANDARDIZERS."""
    return Standardizer(kind, num_channels, name)


def PhiS(num_channels: int, name: str = "") -> Standardizer:
    """PHI-S, W = phi^-1 H U^T: variance 1 in every channel by one scalar scale (2410.01680)."""
    return Standardizer("phi_s", num_channels, name)


def GlobalScale(num_channels: int, name: str = "") -> Standardizer:
    """W = phi^-1 I: the mean variance over channels becomes 1."""
    return Standardizer("global_scale", num_channels, name)


def PerChannel(num_channels: int, name: str = "") -> Standardizer:
    """W = diag(Sigma)^-1/2: every channel is divided by its own standard deviation."""
    return Standardizer("per_channel", num_channels, name)


def PcaWhitening(num_channels: int, name: str = "") -> Standardizer:
    """W = L^-1/2 U^T: the covariance becomes I."""
    return Standardizer("pca", num_channels, name)


def ZcaWhitening(num_channels: int, name: str = "") -> Standardizer:
    """W = U L^-1/2 U^T: the covariance becomes I with the least change."""
    return Standardizer("zca", num_channels, name)


def HadamardWhitening(num_channels: int, name: str = "") -> Standardizer:
    """W = H L^-1/2 U^T: the covariance becomes I, and errors cost the same in every channel."""
    return Standardizer("hadamard", num_channels, name)


def Identity(num_channels: int, name: str = "") -> Standardizer:
    """W = I, mu = 0: features stay as they are; fitted from the start."""
    return Standardizer("identity", num_channels, name)


def save_standardizers(
    path: str | Path, standardizers: Mapping[str, Standardizer], metadata: Mapping[str, str]
) -> None:
    """Write fitted standardizers, without their statistics, into one safetensors file.

    The same maps and metadata give the same bytes.

    Raises:
        RadioError: one of them is not fitted; names the teacher.
    """
    states = {}
    for name, standardizer in standardizers.items():
        count = torch.tensor(standardizer.count)
        states[name] = {"count": count, **standardizer._fitted()._asdict()}
    kinds = {name: standardizer.kind for name, standardizer in standardizers.items()}
    write_file(Path(path), kinds, states, metadata)


def load_standardizers(path: str | Path) -> dict[str, Standardizer]:
    """Return what `save_standardizers` wrote, by teacher.

    Raises:
        RadioError: the file is missing, cut or something else; names it and the way out.
    """
    kinds, states = read_file(Path(path))
    return {
        name: Standardizer(kind, len(states[name]["mean"]), name).load_state_dict(states[name])
        for name, kind in kinds.items()
    }


def read_metadata(path: str | Path) -> dict[str, str]:
    """Return the metadata that `save_standardizers` was given, reading no tensor.

    Raises:
        RadioError: the file is missing, cut or something else; names it and the way out.
    """
    return read_header(Path(path)).metadata
