"""Task `similarity`: how alike two targets arrange the same pictures (linear CKA)."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from radio.errors import RadioError
from radio.evaluation.features import features_of
from radio.evaluation.labelled import pooled
from radio.evaluation.pictures import Pictures
from radio.evaluation.result import RESAMPLES, Interval, Options, Result, percentiles
from radio.evaluation.target import Target
from radio.evaluation.targets import resolve
from radio.progress import Report

MOST = 8192  # pictures of a Gram matrix: 0.5 GB each


def similarity(
    target: Target, data: Pictures, options: Options, progress: Report | None = None
) -> Result:
    """Score linear CKA between `target` and `options.against` on the val split.

    `options.features` names the first target's output; the second gives its summary, or its
    averaged features where it has none. Sizes are each target's own unless `options.size` is
    given. The interval resamples pictures.

    Raises:
        RadioError: no second target, too few or too many pictures, an output that is lacking.
    """
    if options.against is None:
        raise RadioError("similarity compares two targets; name the second with against")
    other = resolve(options.against)
    split = data.split("val")
    if not 3 <= len(split) <= MOST:
        raise RadioError(f"{data.folder} has {len(split)} val pictures; expected 3 to {MOST}")
    names = (options.features or _default(target), _default(other))
    ours, theirs = (
        pooled(features_of(one, split, name, options.size, progress))
        for one, name in zip((target, other), names, strict=True)
    )
    drawn = resampled_cka(ours, theirs, seed=options.seed)
    details = {
        "score_is": "linear CKA",
        "pictures": len(split),
        "against": other.name,
        "features": list(names),
        "dims": [ours.shape[1], theirs.shape[1]],
    }
    return Result("similarity", target.name, cka(ours, theirs), drawn, details)


def cka(a: Float[Tensor, "n d"], b: Float[Tensor, "n e"]) -> float:
    """Return |B^T A|_F^2 / (|A^T A|_F |B^T B|_F) of centred A and B in float64.

    Linear CKA, Kornblith and others, 1905.00414, eq. 4 and 5; 0 where one of them is constant.
    """
    weights = torch.full((1, len(a)), 1 / len(a), dtype=torch.float64)
    return float(_weighted_cka(_gram(a), _gram(b), weights)[0])


def resampled_cka(
    a: Float[Tensor, "n d"], b: Float[Tensor, "n e"], resamples: int = RESAMPLES, seed: int = 0
) -> Interval:
    """Return the 95 % percentile interval of `cka` over resampled pictures."""
    generator = torch.Generator().manual_seed(seed)
    count = len(a)
    chosen = torch.randint(count, (resamples, count), generator=generator)
    counts = torch.zeros(resamples, count, dtype=torch.float64)
    counts.scatter_add_(1, chosen, torch.ones_like(chosen, dtype=torch.float64))
    return percentiles(_weighted_cka(_gram(a), _gram(b), counts / count).numpy())


def _gram(values: Float[Tensor, "n d"]) -> Float[Tensor, "n n"]:
    centred = values.double() - values.double().mean(dim=0)
    return centred @ centred.T


def _weighted_cka(
    first: Float[Tensor, "n n"], second: Float[Tensor, "n n"], weights: Float[Tensor, "r n"]
) -> Float[Tensor, " r"]:
    """Return CKA of pictures that occur with these weights, each row's sum 1.

    With K centred under w, sum_ij w_i w_j K_ij L_ij = w'(K o L)w - 2 w'(Kw o Lw) + w'Kw w'Lw.
    """

    def alike(k: Tensor, of_k: Tensor, m: Tensor, of_m: Tensor) -> Tensor:
        both = (weights @ (k * m) * weights).sum(dim=1)
        crossed = (weights * of_k * of_m).sum(dim=1)
        return both - 2 * crossed + (weights * of_k).sum(dim=1) * (weights * of_m).sum(dim=1)

    of_first, of_second = weights @ first, weights @ second
    shared = alike(first, of_first, second, of_second)
    own = alike(first, of_first, first, of_first) * alike(second, of_second, second, of_second)
    return torch.where(own > 0, shared / own.clamp(min=1e-300).sqrt(), 0.0)


def _default(target: Target) -> str:
    return "summary" if "summary" in target.names else "features"
