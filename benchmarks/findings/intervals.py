"""How sure a difference of two arms is: a paired t interval over seeds, a bootstrap over pictures.

`verdict` is the one place where a difference turns into a word.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from benchmarks.findings.declare import HIGHER, LOWER
from benchmarks.findings.samples import STATISTICS, Samples
from radio.errors import RadioError
from radio.evaluation.result import CONFIDENCE, RESAMPLES, Interval, percentiles

AGREES, DISAGREES, NOT_RESOLVED = "agrees", "disagrees", "not resolved"


def t_quantile(freedom: int, confidence: float = CONFIDENCE) -> float:
    """Return the t that holds `confidence` per cent of Student's distribution between -t and t.

    The share is a finite sum for whole degrees of freedom (Abramowitz and Stegun 26.7.3-4).
    """
    low, high = 0.0, 1.0
    while _share(high, freedom) < confidence / 100:
        high *= 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (low, middle) if _share(middle, freedom) > confidence / 100 else (middle, high)
    return high


def _share(t: float, freedom: int) -> float:
    angle = math.atan(t / math.sqrt(freedom))
    cosine, odd = math.cos(angle), freedom % 2
    term = cosine if odd else 1.0
    total = 0.0
    for at in range(freedom // 2):
        total += term
        k = 2 * at + 1 + odd
        term *= cosine**2 * k / (k + 1)
    total *= math.sin(angle)
    return 2 / math.pi * (angle + total) if odd else total


def over_seeds(differences: Sequence[float]) -> Interval | None:
    """Return the 95 % t interval of the mean of paired differences; None for fewer than two."""
    count = len(differences)
    if count < 2:
        return None
    mean, deviation = float(np.mean(differences)), float(np.std(differences, ddof=1))
    half = t_quantile(count - 1) * deviation / math.sqrt(count)
    return mean - half, mean + half


def over_pictures(
    first: Sequence[Samples], second: Sequence[Samples], resamples: int = RESAMPLES, seed: int = 0
) -> Interval:
    """Return the 95 % interval of the mean over seeds of statistic(first) - statistic(second).

    The same resampled pictures are taken in both arms and all seeds.

    Raises:
        RadioError: other numbers of pictures.
    """
    counts = {len(samples.rows) for samples in (*first, *second)}
    if len(counts) != 1:
        raise RadioError(
            f"arms were measured on {sorted(counts)} pictures; expected the same ones, measure anew"
        )
    (count,) = counts
    chosen = np.random.default_rng(seed).integers(0, count, (resamples, count))
    ours, theirs = ([_resampled(each, chosen) for each in side] for side in (first, second))
    return percentiles(np.mean(ours, axis=0) - np.mean(theirs, axis=0))


def _resampled(samples: Samples, chosen: np.ndarray) -> np.ndarray:
    statistic = STATISTICS[samples.statistic]
    return np.asarray([statistic(samples.rows[rows]) for rows in chosen])


def verdict(difference: float, intervals: Sequence[Interval | None], paper: str | None) -> str:
    """Return what a difference says of the paper's claim.

    Not resolved where an interval holds 0 or there is none over seeds (the first of `intervals`;
    the others count where they are given).
    """
    seeds, *others = intervals
    known = [seeds, *(interval for interval in others if interval is not None)]
    if any(interval is None or interval[0] <= 0 <= interval[1] for interval in known):
        return NOT_RESOLVED
    if paper is None:
        return HIGHER if difference > 0 else LOWER
    return AGREES if (difference > 0) == (paper == HIGHER) else DISAGREES
