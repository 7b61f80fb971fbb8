"""Standardizers: fitted affine maps of a teacher's features, PHI-S above all.

One class holds the statistics and the map; a short function per kind turns a covariance into the
forward matrix W and its inverse: y' = W (y - mu), y = W^-1 y' + mu. With covariance
Sigma = U L U^T, PHI-S (2410.01680, eq. 21-26) is W = phi^-1 H U^T, phi = sqrt(mean L).
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from radio.errors import RadioError
from radio.targets.hadamard import can_build, equal_diagonal_rotation, hadamard

# No standard deviation is taken smaller than FLOOR times the root mean variance (so that constant
# channels and missing rank divide by something), nor the root mean variance smaller than FLOOR.
FLOOR = 1e-6

Matrix = Float[Tensor, "c c"]
Maps = tuple[Matrix, Matrix]  # W and its inverse


class Standardizer:
    """Gather mean and covariance in float64, fit an affine map, apply it.

    Args:
        kind: a row of STANDARDIZERS.
        num_channels: channels of the teacher's features.
        name: the teacher, named in errors.
    """

    def __init__(self, kind: str, num_channels: int, name: str = "") -> None:
        if kind not in STANDARDIZERS:
            known = ", ".join(STANDARDIZERS)
            raise RadioError(f"unknown standardizer '{kind}' of teacher '{name}'; known: {known}")
        self.kind = kind
        self.num_channels = num_channels
        self.name = name
        self.count = 0
        self.mean = torch.zeros(num_channels, dtype=torch.float64)
        self.scatter = torch.zeros(num_channels, num_channels, dtype=torch.float64)
        self.matrix: Tensor | None = None
        self.inverse: Tensor | None = None
        self._cast: dict[tuple[torch.dtype, torch.device], tuple[Tensor, Tensor, Tensor]] = {}

    @property
    def is_fitted(self) -> bool:
        """Whether `transform` can be used."""
        return self.matrix is not None

    def partial_fit(self, x: Float[Tensor, "n c"]) -> Standardizer:
        """Add rows to the statistics, in float64, and return self."""
        self._check_channels(x)
        rows = x.detach().to("cpu", torch.float64)
        if not bool(torch.isfinite(rows).all()):
            raise RadioError(f"teacher '{self.name}' gave NaN or infinity; nothing can be fitted")
        mean = rows.mean(0)
        centred = rows - mean
        self._merge(len(rows), mean, centred.T @ centred)
        return self

    def merge(self, other: Standardizer) -> Standardizer:
        """Add another standardizer's statistics (Chan's rule) and return self."""
        if (other.kind, other.num_channels) != (self.kind, self.num_channels):
            raise RadioError(
                f"cannot merge {other.kind} of {other.num_channels} channels into {self.kind} of "
                f"{self.num_channels} (teacher '{self.name}')"
            )
        self._merge(other.count, other.mean, other.scatter)
        return self

    def _merge(self, count: int, mean: Tensor, scatter: Tensor) -> None:
        if count == 0:
            return
        total = self.count + count
        delta = mean - self.mean
        self.scatter = (
            self.scatter + scatter + torch.outer(delta, delta) * (self.count * count / total)
        )
        self.mean = self.mean + delta * (count / total)
        self.count = total

    def fit(self) -> Standardizer:
        """Compute the map from the statistics and return self.

        The covariance is the biased one (divided by n). Eigenvector signs are canonical, but
        eigh differs between machines in the last bits: fit once and share the file.
        """
        if self.count < 2:
            raise RadioError(
                f"the standardizer of teacher '{self.name}' saw {self.count} positions; raise "
                "fit.steps"
            )
        covariance = self.scatter / self.count
        self._set(*STANDARDIZERS[self.kind](covariance))
        return self

    def _set(self, matrix: Tensor, inverse: Tensor) -> None:
        self.matrix, self.inverse = matrix.contiguous(), inverse.contiguous()
        self._cast.clear()

    def transform(self, x: Float[Tensor, "*batch c"]) -> Float[Tensor, "*batch c"]:
        """Return y' = W (y - mu), keeping dtype and device."""
        mean, matrix, _ = self._as(x)
        return ((x.to(matrix.dtype) - mean) @ matrix.T).to(x.dtype)

    def inverse_transform(self, y: Float[Tensor, "*batch c"]) -> Float[Tensor, "*batch c"]:
        """Return y = W^-1 y' + mu, keeping dtype and device."""
        mean, _, inverse = self._as(y)
        return (y.to(inverse.dtype) @ inverse.T + mean).to(y.dtype)

    def transform_map(self, features: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """Standardize features whose channels are dimension 1."""
        return self.transform(features.movedim(1, -1)).movedim(-1, 1).contiguous()

    def as_linear(self) -> tuple[Float[Tensor, "c c"], Float[Tensor, " c"]]:
        """Return (weight, bias) of the inverse, float64: y = y' @ weight.T + bias."""
        self._require_fit()
        assert self.inverse is not None
        return self.inverse, self.mean

    def state_dict(self) -> dict[str, Tensor]:
        """Return the map, or the statistics while there is no map yet; float64."""
        state = {"count": torch.tensor(self.count), "mean": self.mean}
        if self.matrix is None or self.inverse is None:
            return {**state, "scatter": self.scatter}
        return {**state, "matrix": self.matrix, "inverse": self.inverse}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> Standardizer:
        """Restore what `state_dict` returned and return self."""
        if state["mean"].shape != (self.num_channels,):
            raise RadioError(
                f"a state of {len(state['mean'])} channels does not fit the standardizer of "
                f"teacher '{self.name}' with {self.num_channels}"
            )
        self.count, self.mean = int(state["count"]), state["mean"].double()
        if "scatter" in state:
            self.scatter = state["scatter"].double()
        else:
            self._set(state["matrix"].double(), state["inverse"].double())
        return self

    def _as(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        self._require_fit()
        self._check_channels(x)
        assert self.matrix is not None and self.inverse is not None
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        key = (dtype, x.device)
        if key not in self._cast:
            maps = (self.mean, self.matrix, self.inverse)
            mean, matrix, inverse = (tensor.to(x.device, dtype) for tensor in maps)
            self._cast[key] = mean, matrix, inverse
        return self._cast[key]

    def _require_fit(self) -> None:
        if self.matrix is None:
            raise RadioError(
                f"the standardizer of teacher '{self.name}' is not fitted; run `radio fit`"
            )

    def _check_channels(self, x: Tensor) -> None:
        if x.shape[-1] != self.num_channels:
            raise RadioError(
                f"teacher '{self.name}' has {x.shape[-1]} channels but its standardizer has "
                f"{self.num_channels}; run: radio fit"
            )


def _eigen(covariance: Matrix) -> tuple[Tensor, Matrix, float]:
    """Return eigenvalues (clipped at 0), canonical eigenvectors in columns, and phi."""
    values, vectors = torch.linalg.eigh(covariance)
    values = values.clamp_min(0)
    largest = vectors.abs().argmax(0)
    signs = vectors.gather(0, largest[None]).sign()
    return values, vectors * signs, max(float(values.mean().sqrt()), FLOOR)


def _rotation(values: Tensor) -> Matrix:
    """Return an orthogonal matrix that spreads the eigenvalues evenly over all channels."""
    n = len(values)
    if can_build(n):
        return hadamard(n) / n**0.5
    return equal_diagonal_rotation(torch.diag(values))


def _phi_s(covariance: Matrix) -> Maps:
    values, vectors, phi = _eigen(covariance)
    rotation = _rotation(values) @ vectors.T
    return rotation / phi, rotation.T * phi


def _global_scale(covariance: Matrix) -> Maps:
    phi = max(float(covariance.diagonal().clamp_min(0).mean().sqrt()), FLOOR)
    eye = torch.eye(len(covariance), dtype=torch.float64)
    return eye / phi, eye * phi


def _per_channel(covariance: Matrix) -> Maps:
    variances = covariance.diagonal().clamp_min(0)
    deviations = variances.sqrt().clamp_min(FLOOR * max(float(variances.mean().sqrt()), FLOOR))
    return torch.diag(1 / deviations), torch.diag(deviations)


def _whitening(covariance: Matrix, turn: Callable[[Matrix], Matrix]) -> Maps:
    values, vectors, phi = _eigen(covariance)
    deviations = values.sqrt().clamp_min(FLOOR * phi)
    left = turn(vectors)
    return left @ (vectors / deviations).T, (vectors * deviations) @ left.T


def _pca(covariance: Matrix) -> Maps:
    return _whitening(covariance, lambda vectors: torch.eye(len(vectors), dtype=torch.float64))


def _zca(covariance: Matrix) -> Maps:
    return _whitening(covariance, lambda vectors: vectors)


def _hadamard(covariance: Matrix) -> Maps:
    spread = torch.ones(len(covariance), dtype=torch.float64)
    return _whitening(covariance, lambda vectors: _rotation(spread))


def _identity(covariance: Matrix) -> Maps:
    eye = torch.eye(len(covariance), dtype=torch.float64)
    return eye, eye


STANDARDIZERS: dict[str, Callable[[Matrix], Maps]] = {
    "phi_s": _phi_s,
    "global_scale": _global_scale,
    "per_channel": _per_channel,
    "pca": _pca,
    "zca": _zca,
    "hadamard": _hadamard,
    "identity": _identity,
}


def make_standardizer(kind: str, num_channels: int, name: str = "") -> Standardizer:
    """Return an unfitted standardizer of a kind in STANDARDIZERS."""
    return Standardizer(kind, num_channels, name)


PhiS = functools.partial(Standardizer, "phi_s")
GlobalScale = functools.partial(Standardizer, "global_scale")
PerChannel = functools.partial(Standardizer, "per_channel")
PcaWhitening = functools.partial(Standardizer, "pca")
ZcaWhitening = functools.partial(Standardizer, "zca")
HadamardWhitening = functools.partial(Standardizer, "hadamard")
Identity = functools.partial(Standardizer, "identity")


def save_standardizers(
    path: Path, standardizers: Mapping[str, Standardizer], metadata: Mapping[str, str]
) -> None:
    """Write fitted standardizers into one safetensors file, kinds and metadata in its header."""
    tensors = {
        f"{name}|{key}": value
        for name, standardizer in standardizers.items()
        for key, value in standardizer.state_dict().items()
    }
    kinds = {name: standardizer.kind for name, standardizer in standardizers.items()}
    # The header's order is not stable between runs, a single entry is.
    header = json.dumps({"kinds": kinds, **metadata}, sort_keys=True)
    save_file(tensors, path, metadata={"radio": header})


def load_standardizers(path: Path) -> dict[str, Standardizer]:
    """Read what `save_standardizers` wrote.

    Raises:
        RadioError: the file is missing, cut, or something else.
    """
    kinds = json.loads(read_metadata(path)["kinds"])
    with safe_open(path, "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 no mapping
    loaded = {}
    for name, kind in kinds.items():
        prefix = f"{name}|"
        state = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
        loaded[name] = Standardizer(kind, len(state["mean"]), name).load_state_dict(state)
    return loaded


def read_metadata(path: Path) -> dict[str, str]:
    """Return a standardizer file's metadata; `kinds` is JSON of the kind by teacher."""
    try:
        with safe_open(path, "pt") as file:
            header = json.loads((file.metadata() or {})["radio"])
    except (OSError, SafetensorError, KeyError) as error:
        raise RadioError(
            f"{path} is no whole standardizer file ({error}); run `radio fit` to make it again"
        ) from error
    return {**header, "kinds": json.dumps(header["kinds"])}
