"""What a task returns, what it can be told, and how sure a score is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from radio.errors import RadioError

Statistic = Callable[[NDArray[Any]], float]
Interval = tuple[float, float]

RESAMPLES = 1000
CONFIDENCE = 95.0  # per cent
PROMPTS = ("point", "box")


@dataclass
class Result:
    """A target's score on a task with its 95 % interval; `details` is ready for JSON.

    `samples` are the per-picture values [N, ...] behind the score, for paired comparisons of two
    targets on the same pictures; they are not written.
    """

    task: str
    target: str
    score: float
    interval: Interval | None
    details: dict[str, Any] = field(default_factory=dict)
    samples: Any = None

    def as_dict(self) -> dict[str, Any]:
        """Return what goes into JSON: task, target, score, interval, details."""
        return {
            "task": self.task,
            "target": self.target,
            "score": self.score,
            "interval": None if self.interval is None else list(self.interval),
            "details": self.details,
        }


@dataclass(frozen=True)
class Options:
    """What a task may be told; each reads the fields that concern it.

    Raises:
        RadioError: an unknown prompt, a size below 1 px, or a class twice.
    """

    size: int | None = None  # px a side; the target's own when not given
    features: str | None = None  # the output that is probed, such as clip:summary
    classes: tuple[int, ...] | None = None  # score only among these
    adaptor: str | None = None  # of an encoder: whose text tower or mask decoder
    tokenizer: str | None = None  # folder of the text tower's, where none lies next to its weights
    against: str | None = None  # the second target of a comparison
    sizes: tuple[int, ...] | None = None  # px, of a curve over resolutions
    prompt: str = "box"  # of masks: point or box
    templates: tuple[str, ...] | None = None  # texts with {} in the place of a class's name
    ignore: int | None = None  # the value of label maps that is not scored
    seed: int = 0

    def __post_init__(self) -> None:
        if self.prompt not in PROMPTS:
            raise RadioError(f"unknown prompt '{self.prompt}'; known: {', '.join(PROMPTS)}")
        for side in (self.size, *(self.sizes or ())):
            if side is not None and side < 1:
                raise RadioError(f"a size of {side} px; expected 1 or more")
        if self.classes is not None:
            twice = sorted({c for c in self.classes if self.classes.count(c) > 1})
            if twice or not self.classes:
                what = f"class {twice[0]} is listed twice" if twice else "no class is listed"
                raise RadioError(f"{what}; expected different class numbers of classes.txt")


def mean(values: NDArray[Any]) -> float:
    """Return the mean over the first axis of per-picture values."""
    return float(values.mean(axis=0))


def weighted(rows: NDArray[Any], weights: NDArray[np.float64]) -> NDArray[Any]:
    """Return rows [N, ...] times the weights [N] of their pictures, whose mean is 1."""
    return rows * weights.reshape(-1, *[1] * (rows.ndim - 1))


def bootstrap(
    values: ArrayLike,
    statistic: Statistic = mean,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval:
    """Return the 95 % percentile interval of a statistic by the Bayesian bootstrap.

    Each resample weighs every picture by w ~ Exp(1) of mean 1 (Rubin 1981), where drawing pictures
    would leave some out: with its only picture a class vanishes from a mean over classes, and what
    is left scores higher.

    Args:
        values: [N, ...], a row per picture.
        statistic: of [N, ...]; the mean if not given. It must be a function of sums of the rows
            that does not change with their scale, or of means, and take fractions, so that of
            `weighted` rows it is the weighted statistic.

    Raises:
        RadioError: no rows.
    """
    rows = np.asarray(values)
    found = [statistic(weighted(rows, each)) for each in _weights(len(rows), resamples, seed)]
    return percentiles(np.asarray(found))


def paired_bootstrap(
    a: ArrayLike,
    b: ArrayLike,
    statistic: Statistic = mean,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval:
    """Return the 95 % interval of statistic(a) - statistic(b), as `bootstrap`; one w for both.

    Raises:
        RadioError: no rows, or another number of them in `a` than in `b`.
    """
    ours, theirs = np.asarray(a), np.asarray(b)
    if len(ours) != len(theirs):
        raise RadioError(
            f"{len(ours)} pictures are paired with {len(theirs)}; expected the same pictures"
        )
    found = [
        statistic(weighted(ours, each)) - statistic(weighted(theirs, each))
        for each in _weights(len(ours), resamples, seed)
    ]
    return percentiles(np.asarray(found))


def percentiles(values: NDArray[Any]) -> Interval:
    """Return the 2.5th and 97.5th percentile of a statistic's resampled values."""
    tail = (100 - CONFIDENCE) / 2
    low, high = np.percentile(values, (tail, 100 - tail))
    return float(low), float(high)


def _weights(count: int, resamples: int, seed: int) -> NDArray[np.float64]:
    """Draw each resample's weights [resamples, count], all above 0 and 1 in the mean."""
    if not count:
        raise RadioError("there is no picture to score; expected one or more")
    drawn = np.random.default_rng(seed).standard_exponential((resamples, count))
    weights: NDArray[np.float64] = drawn / drawn.mean(axis=1, keepdims=True)
    return weights
