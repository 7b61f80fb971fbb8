"""Spectral reparametrisation: a Linear's largest singular value becomes a weight of its own.

W' = W (softplus(scale) + 0.05) / sigma, sigma = u^T W v + eps by power iteration; PHI-S A.7 trains
with it and lets the weight decay act on `scale`. Upstream: NVlabs/RADIO
`enable_spectral_reparam.py` (version 2), with its key names.
"""

from __future__ import annotations

import logging
import math
from typing import Any, cast

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
            norm = F.softplus(self.scale) + ALPHA
            return weight * (norm / _sigma(weight, self._u, self._v))

    def iterate(self, weight: Float[Tensor, "out in"]) -> None:
        """Take one step towards the weight's singular vectors."""
        # New tensors: a backward through an earlier forward still needs the old ones.
        self._u, self._v = power_iteration(weight, self._u, self._v)


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

    def iterate(self, weight: Float[Tensor, "three_out in"]) -> None:
        """Take one step for every part."""
        for factor, part in zip(self.parts, weight.chunk(3), strict=True):
            cast(SpectralWeight, factor).iterate(part)


def iterate_spectral(module: nn.Module) -> None:
    """Let every spectral norm below `module` follow its weight by one power iteration.

    To be called once in a training step. Upstream iterates in every forward, so that the norm would
    depend on how many partitions, micro-shards and recomputations a process has in its step.
    """
    for linear in module.modules():
        if parametrize.is_parametrized(linear, "weight"):
            chain = cast(Any, linear).parametrizations.weight
            for factor in chain:
                factor.iterate(chain.original)


@torch.no_grad()
def power_iteration(
    weight: Float[Tensor, "out in"], u: Float[Tensor, " out"], v: Float[Tensor, " in"]
) -> tuple[Float[Tensor, " out"], Float[Tensor, " in"]]:
    """Return u = W v / |W v|, then v = W^T u / |W^T u|, in the order of torch's spectral norm."""
    u = F.normalize(weight @ v, dim=0, eps=EPS)
    return u, F.normalize(weight.mT @ u, dim=0, eps=EPS)


def _sigma(weight: Tensor, u: Tensor, v: Tensor) -> Tensor:
    return torch.dot(u, weight @ v) + EPS
