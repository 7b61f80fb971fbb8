"""Task `rank`: in how many directions a target's summaries vary (RankMe)."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from radio.evaluation.features import features_of
from radio.evaluation.labelled import pooled
from radio.evaluation.pictures import Pictures
from radio.evaluation.result import Options, Result
from radio.evaluation.target import Target
from radio.progress import Report

EPSILON = 1e-7
GROUPS = 20  # of the jackknife at most
SPECTRUM = 64  # points of the curve at most


def rank(
    target: Target, data: Pictures, options: Options, progress: Report | None = None
) -> Result:
    """Score RankMe (2210.02885) of the val split: `rank_me` of summaries, or of averaged maps.

    It grows with the number of pictures, so compare targets on the same ones. The interval is
    1.96 standard errors of a jackknife over 20 groups: a bootstrap's uneven weights would
    lower every rank that it draws. `participating_dims` is (sum v)^2 / sum v^2 over the variances
    v of the principal components.

    Raises:
        RadioError: an output that the target lacks.
    """
    name = options.features or ("summary" if "summary" in target.names else "features")
    values = pooled(features_of(target, data.split("val"), name, options.size, progress))
    spectrum = singular_values(values)
    score = effective_rank(spectrum)
    energy = singular_values(values - values.mean(dim=0)).square()
    order = np.unique(np.geomspace(1, len(spectrum), SPECTRUM).round().astype(int))
    details = {
        "score_is": "RankMe",
        "pictures": len(values),
        "features": name,
        "dims": values.shape[1],
        "participating_dims": float(energy.sum().square() / energy.square().sum().clamp(1e-300)),
        "rank_over_dims": score / values.shape[1],
        "curve": {
            "label": "singular value",
            "log": True,
            "x": order.tolist(),
            "y": {"share of the sum": (spectrum / spectrum.sum())[order - 1].tolist()},
        },
    }
    interval = _jackknife(values, score, options.seed)
    return Result("rank", target.name, score, interval, details)


def rank_me(values: Float[Tensor, "n dim"]) -> float:
    """Return exp(-sum_k p_k ln p_k), p_k = sigma_k / (sum sigma + 1e-7).

    RankMe, 2210.02885, as RADIO's examples/ssl_metrics.py has it: sigma are the singular values of
    the uncentred [n, dim], float64.
    """
    return effective_rank(singular_values(values))


def singular_values(values: Float[Tensor, "n dim"]) -> Float[Tensor, " k"]:
    """Return the singular values in float64, the largest first."""
    spectrum: Tensor = torch.linalg.svdvals(values.double())
    return spectrum


def effective_rank(spectrum: Float[Tensor, " k"]) -> float:
    """Return the exponential of the entropy of the spectrum's shares."""
    return float(torch.special.entr(spectrum / (spectrum.sum() + EPSILON)).sum().exp())


def _jackknife(
    values: Float[Tensor, "n dim"], score: float, seed: int
) -> tuple[float, float] | None:
    """Return score -+ 1.96 se, se^2 = (g - 1) / g sum (s_j - mean s)^2 without group j."""
    count = min(GROUPS, len(values))
    if count < 2:
        return None
    order = torch.randperm(len(values), generator=torch.Generator().manual_seed(seed))
    groups = torch.arange(len(values)) % count
    left = [rank_me(values[order[groups != group]]) for group in range(count)]
    error = float(np.sqrt((count - 1) * np.var(left)))
    return score - 1.96 * error, score + 1.96 * error
