"""Task `similarity`: how alike two targets arrange the same pictures (linear CKA)."""

from __future__ import annotations

import math

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from radio.errors import RadioError
from radio.evaluation.features import features_of
from radio.evaluation.labelled import pooled
from radio.evaluation.pictures import Pictures
from radio.evaluation.result import RESAMPLES, Interval, Options, Result, bootstrap
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
    given.

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
    interval = cka_interval(ours, theirs, seed=options.seed)
    details = {
        "score_is": "linear CKA",
        "pictures": len(split),
        "against": other.name,
        "features": list(names),
        "dims": [ours.shape[1], theirs.shape[1]],
    }
    return Result("similarity", target.name, cka(ours, theirs), interval, details)


def cka(a: Float[Tensor, "n d"], b: Float[Tensor, "n e"]) -> float:
    """Return |B^T A|_F^2 / (|A^T A|_F |B^T B|_F) of centred A and B in float64.

    Linear CKA, Kornblith and others, 1905.00414, eq. 4 and 5; 0 where one of them is constant.
    """
    return cka_and_effects(a, b)[0]


def cka_interval(
    a: Float[Tensor, "n d"], b: Float[Tensor, "n e"], resamples: int = RESAMPLES, seed: int = 0
) -> Interval:
    """Return the 95 % interval of `cka` by the Bayesian bootstrap of each picture's effect on it.

    The effect is that on ln CKA to first order. Weights in both sums over pairs of pictures would
    count a heavy picture's likeness to itself by its square, which raises every CKA: that of two
    random targets would lie below its own interval.
    """
    score, effects = cka_and_effects(a, b)
    low, high = bootstrap(effects * len(effects), resamples=resamples, seed=seed)
    return score * math.exp(low), min(1.0, score * math.exp(high))


def cka_and_effects(
    a: Float[Tensor, "n d"], b: Float[Tensor, "n e"]
) -> tuple[float, Float[np.ndarray, " n"]]:
    """Return CKA, and d ln CKA / d ln w of each picture's weight w; 0 where CKA is.

    With K and L the centred Gram matrices CKA is S_KL / sqrt(S_KK S_LL), S_KL = sum_ij K_ij L_ij.
    Picture i has a row and a column in each: S_KL's share of it is 2 sum_j K_ij L_ij / S_KL. What
    its weight does to the mean that is taken off is of second order, as K's rows sum to 0.
    """
    first, second = _gram(a), _gram(b)
    products = (first * second, first.square(), second.square())
    rows = torch.stack([product.sum(dim=1) for product in products])
    both, own, other = rows.sum(dim=1).tolist()
    if min(both, own, other) <= 0:
        return 0.0, np.zeros(len(a))
    of_both, of_own, of_other = 2 * rows / rows.sum(dim=1, keepdim=True)
    return both / math.sqrt(own * other), (of_both - (of_own + of_other) / 2).numpy()


def _gram(values: Float[Tensor, "n d"]) -> Float[Tensor, "n n"]:
    centred = values.double() - values.double().mean(dim=0)
    return centred @ centred.T


def _default(target: Target) -> str:
    return "summary" if "summary" in target.names else "features"
