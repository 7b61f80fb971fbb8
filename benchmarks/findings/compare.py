"""From records to what a page says: means, ranks, and differences with how sure they are.

A difference of two arms has a paired t interval over seeds and a bootstrap over pictures; `verdict`
is the one place where it turns into a word.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from benchmarks.findings.declare import HIGHER, LOWER, RANK, Comparison, Finding
from benchmarks.findings.measures import Samples
from benchmarks.findings.records import Record
from radio.errors import RadioError
from radio.evaluation.result import CONFIDENCE, Interval, bootstrap

AGREES, DISAGREES, NOT_RESOLVED = "agrees", "disagrees", "not resolved"


@dataclass(frozen=True)
class Compared:
    """One comparison, measured: means of both sides over the seeds that both have."""

    comparison: Comparison
    first: float
    second: float
    seeds: Interval | None
    pictures: Interval | None
    verdict: str

    @property
    def difference(self) -> float:
        """First less second."""
        return self.first - self.second


def arms_of(records: Sequence[Record]) -> list[str]:
    """Return the arms of records, in their order."""
    return list(dict.fromkeys(record.arm for record in records))


def metrics_of(patterns: Sequence[str], records: Sequence[Record]) -> list[str]:
    """Return the metrics that a pattern names, in the patterns' and then the records' order."""
    known = dict.fromkeys(name for record in records for name in record.scores)
    return list(dict.fromkeys(m for each in patterns for m in known if fnmatchcase(m, each)))


def values_of(records: Sequence[Record], arm: str, metric: str) -> dict[int, float]:
    """Return an arm's scores by seed, of the seeds that have the metric."""
    ours = (record for record in records if record.arm == arm)
    return {record.seed: record.scores[metric] for record in ours if metric in record.scores}


def mean(records: Sequence[Record], arm: str, metric: str) -> float | None:
    """Return the mean over an arm's seeds, None where it has no such metric."""
    values = values_of(records, arm, metric)
    return float(np.mean(list(values.values()))) if values else None


def compare(comparison: Comparison, records: Sequence[Record]) -> Compared | None:
    """Measure a comparison on the seeds that both sides have; None where there is none."""
    sides = (comparison.first, comparison.second)
    first, second = (values_of(records, side.arm, side.metric) for side in sides)
    seeds = [seed for seed in first if seed in second]
    if not seeds:
        return None
    by_arm = {(record.arm, record.seed): record.samples for record in records}
    ours, theirs = ([by_arm[side.arm, seed].get(side.metric) for seed in seeds] for side in sides)
    between = over_seeds([first[seed] - second[seed] for seed in seeds])
    pictures = over_pictures(ours, theirs)
    means = [float(np.mean([side[seed] for seed in seeds])) for side in (first, second)]
    word = verdict(means[0] - means[1], (between, pictures), comparison.paper)
    return Compared(comparison, means[0], means[1], between, pictures, word)


def over_seeds(differences: Sequence[float]) -> Interval | None:
    """Return the 95 % t interval of the mean of paired differences; None for fewer than two."""
    count = len(differences)
    if count < 2:
        return None
    middle, deviation = float(np.mean(differences)), float(np.std(differences, ddof=1))
    t = float(stats.t.ppf((1 + CONFIDENCE / 100) / 2, count - 1))
    half = t * deviation / math.sqrt(count)
    return middle - half, middle + half


def over_pictures(
    first: Sequence[Samples | None], second: Sequence[Samples | None]
) -> Interval | None:
    """Return the 95 % interval of the mean over seeds of first - second; None without samples.

    A picture weighs the same in both arms and all seeds.

    Raises:
        RadioError: other numbers of pictures.
    """
    pairs = [(a, b) for a, b in zip(first, second, strict=True) if a is not None and b is not None]
    if len(pairs) < len(first):
        return None
    counts = {len(samples.rows) for pair in pairs for samples in pair}
    if len(counts) > 1:
        raise RadioError(
            f"arms were measured on {sorted(counts)} pictures; expected the same ones, measure anew"
        )

    def lead(weights: NDArray[np.float64]) -> float:
        return float(np.mean([a.score(weights) - b.score(weights) for a, b in pairs]))

    return bootstrap(np.ones(counts.pop()), lead)


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


def with_ranks(finding: Finding, records: Sequence[Record]) -> list[Record]:
    """Return records with their arm's mean rank over the ranked metrics, of seeds all arms have.

    1 is the highest; equal values share their mean rank.
    """
    arms = [arm for arm in arms_of(records) if arm not in finding.unranked]
    metrics = metrics_of(finding.ranked, records)
    if not metrics or len(arms) < 2:
        return list(records)
    scores = {(record.arm, record.seed): record.scores for record in records}
    found: dict[tuple[str, int], float] = {}
    for seed in {record.seed for record in records}:
        ours = [scores.get((arm, seed), {}) for arm in arms]
        if all(metric in each for each in ours for metric in metrics):
            values = [[-each[metric] for each in ours] for metric in metrics]
            ranks = stats.rankdata(values, axis=1).mean(axis=0)
            found |= {(arm, seed): float(rank) for arm, rank in zip(arms, ranks, strict=True)}
    return [
        replace(record, scores={RANK: found[record.arm, record.seed], **record.scores})
        if (record.arm, record.seed) in found
        else record
        for record in records
    ]
