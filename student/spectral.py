"""Spectral reparametrisation: a Linear's largest singular value becomes a weight of its own.

W' = W (softplus(scale) + 0.05) / sigma, sigma = u^T W v + eps by power iteration; PHI-S A.7 trains
with it and lets the weight decay act on `scale`. Upstream: NVlabs/RADIO
`enable_spectral_reparam.py` (version 2), with its key names.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Iterator
from contextvars import ContextVar
from typing import cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils import parametrize

ALPHA = 0.05  # upstream's floor under the learned norm
EPS = 1e-6
VERSION = 2
START_ITERATIONS = 35  # 15 of torch's spectral norm and 20 of upstream's first sigma
LEAST = 1e-5  # of softplus(scale); upstream's

log = logging.getLogger("radio.student")

Vectors = dict["SpectralWeight", tuple[Tensor, Tensor]]
_RECORD: ContextVar[Vectors | None] = ContextVar("record", default=None)
_REPLAY: ContextVar[Vectors | None] = ContextVar("replay", default=None)


def spectral_reparametrise(module: nn.Module) -> None:
    """Reparametrise every Linear below `module` in place, but the patch projection, as upstream.

    The weights stay what they are; `qkv` gets a factor for each of its three parts.

    Recipe: spectral reparametrisation; PHI-S (2410.01680) section A.7; student.spectral;
    tests/test_spectral.py::test_the_factor_is_the_spectral_norm.
    """
    for name, linear in list(module.named_modules()):
        if not isinstance(linear, nn.Linear) or "patch_generator" in name:
            continue
        weight = linear.weight.detach()
        kind = SpectralParts if name.rsplit(".", 1)[-1] == "qkv" else SpectralWeight
        was_training = linear.training
        linear.eval()  # registering runs the factor once, which must not iterate
        parametrize.register_parametrization(linear, "weight", kind(weight, name))
        linear.train(was_training)


class SpectralWeight(nn.Module):
    """The factor of one matrix; every forward in training takes one step of power iteration.

    `_u` [out] and `_v` [in] are the estimates of the first singular vectors.
    """

    _u: Tensor
    _v: Tensor

    def __init__(self, weight: Float[Tensor, "out in"], name: str = "") -> None:
        super().__init__()
        self.name = name
        u, v = (F.normalize(torch.randn(side), dim=0).to(weight) for side in weight.shape)
        self.register_buffer("_u", u)
        self.register_buffer("_v", v)
        self.register_buffer("_sn_version", torch.tensor(VERSION, device=weight.device))
        # Two-dimensional, so that it is among the weights that decay.
        self.scale = nn.Parameter(torch.zeros(1, 1, device=weight.device))

    @torch.no_grad()
    def right_inverse(self, weight: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
        """Set vectors and scale so that `weight` stays what it is, and return it.

        torch calls this when the factor is registered, and for `linear.weight = weight` later on.
        """
        for _ in range(START_ITERATIONS):
            self._u, self._v = power_iteration(weight, self._u, self._v)
        sigma = float(_sigma(weight, self._u, self._v))
        if sigma - ALPHA < LEAST and weight.any():
            log.warning(
                "the spectral norm of %s is %.3g and is raised to %g", self.name, sigma, ALPHA
            )
        softplus = max(sigma - ALPHA, LEAST)
        self.scale.fill_(softplus + math.log(-math.expm1(-softplus)))
        return weight

    def forward(self, weight: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
        """Return the weight whose spectral norm is softplus(scale) + 0.05; never in autocast."""
        with torch.autocast(weight.device.type, enabled=False):
            u, v = self._vectors(weight)
            norm = F.softplus(self.scale) + ALPHA
            return weight * (norm / _sigma(weight, u, v))

    def _vectors(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        replayed = (_REPLAY.get() or {}).get(self)
        if replayed is not None:
            return replayed
        if self.training:
            # New tensors: a backward through an earlier forward still needs the old ones.
            self._u, self._v = power_iteration(weight, self._u, self._v)
        record = _RECORD.get()
        if record is not None:
            record[self] = self._u, self._v
        return self._u, self._v


class SpectralParts(nn.Module):
    """One factor for each of query, key and value, which lie below each other in one matrix."""

    def __init__(self, weight: Float[Tensor, "three_out in"], name: str = "") -> None:
        super().__init__()
        self.parts = nn.ModuleList(
            SpectralWeight(part, f"{name}[{index}]") for index, part in enumerate(weight.chunk(3))
        )

    def forward(self, weight: Float[Tensor, "three_out in"]) -> Float[Tensor, "three_out in"]:
        """Return the parts, each with its factor."""
        cut = zip(self.parts, weight.chunk(3), strict=True)
        return torch.cat([factor(part) for factor, part in cut])

    def right_inverse(self, weight: Float[Tensor, "three_out in"]) -> Float[Tensor, "three_out in"]:
        """Set every part's factor so that `weight` stays what it is, and return it."""
        for factor, part in zip(self.parts, weight.chunk(3), strict=True):
            cast(SpectralWeight, factor).right_inverse(part)
        return weight


@torch.no_grad()
def power_iteration(
    weight: Float[Tensor, "out in"], u: Float[Tensor, " out"], v: Float[Tensor, " in"]
) -> tuple[Float[Tensor, " out"], Float[Tensor, " in"]]:
    """Return u = W v / |W v|, then v = W^T u / |W^T u|, in the order of torch's spectral norm."""
    u = F.normalize(weight @ v, dim=0, eps=EPS)
    return u, F.normalize(weight.mT @ u, dim=0, eps=EPS)


def _sigma(weight: Tensor, u: Tensor, v: Tensor) -> Tensor:
    return torch.dot(u, weight @ v) + EPS


def computed_twice() -> tuple[
    contextlib.AbstractContextManager[None], contextlib.AbstractContextManager[None]
]:
    """Return contexts for a checkpointed forward and its repetition, which takes its vectors.

    Without them the repetition would iterate once more and find another weight.
    """
    vectors: Vectors = {}
    return _set(_RECORD, vectors), _set(_REPLAY, vectors)


@contextlib.contextmanager
def _set(variable: ContextVar[Vectors | None], vectors: Vectors) -> Iterator[None]:
    token = variable.set(vectors)
    try:
        yield
    finally:
        variable.reset(token)
