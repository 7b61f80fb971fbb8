"""From records to what a page says: means, paired differences with their intervals, ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import numpy as np

from benchmarks.findings.declare import Comparison, Finding
from benchmarks.findings.intervals import over_pictures, over_seeds, verdict
from benchmarks.findings.records import Record
from radio.evaluation.result import RESAMPLES, Interval

BySeed = Mapping[int, Record]


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


def arms_of(records: Sequence[Record]) -> dict[str, BySeed]:
    """Return records by arm and seed, in their order."""
    found: dict[str, dict[int, Record]] = {}
    for record in records:
        found.setdefault(record.arm, {})[record.seed] = record
    return dict(found)


def compare(
    comparison: Comparison, arms: Mapping[str, BySeed], resamples: int = RESAMPLES
) -> Compared | None:
    """Measure a comparison on the seeds that both sides have; None where there is none."""
    first, second = (arms.get(side.arm, {}) for side in (comparison.first, comparison.second))
    seeds = [
        seed
        for seed in first
        if seed in second
        and comparison.first.metric in first[seed].scores
        and comparison.second.metric in second[seed].scores
    ]
    if not seeds:
        return None
    ours = [first[seed].scores[comparison.first.metric] for seed in seeds]
    theirs = [second[seed].scores[comparison.second.metric] for seed in seeds]
    differences = [a - b for a, b in zip(ours, theirs, strict=True)]
    between = over_seeds(differences)
    pictures = _pictures(comparison, first, second, seeds, resamples)
    word = verdict(float(np.mean(differences)), (between, pictures), comparison.paper)
    return Compared(
        comparison, float(np.mean(ours)), float(np.mean(theirs)), between, pictures, word
    )


def _pictures(
    comparison: Comparison, first: BySeed, second: BySeed, seeds: Sequence[int], resamples: int
) -> Interval | None:
    sides = ((comparison.first, first), (comparison.second, second))
    if not all(side.metric in records[seed].samples for side, records in sides for seed in seeds):
        return None
    ours, theirs = ([records[seed].samples[s.metric] for seed in seeds] for s, records in sides)
    return over_pictures(ours, theirs, resamples)


def metrics_of(patterns: Sequence[str], records: Sequence[Record]) -> list[str]:
    """Return the metrics that a pattern names, in the patterns' and then the records' order."""
    known = dict.fromkeys(name for record in records for name in record.scores)
    return list(dict.fromkeys(m for each in patterns for m in known if fnmatchcase(m, each)))


def mean(records: BySeed, metric: str) -> float | None:
    """Return the mean over an arm's seeds, None where it has no such metric."""
    values = [each.scores[metric] for each in records.values() if metric in each.scores]
    return float(np.mean(values)) if values else None


def ranks(finding: Finding, records: Sequence[Record]) -> dict[str, float]:
    """Return each arm's mean rank over the ranked metrics and the seeds that all arms have.

    1 is the highest; equal values share their mean rank.
    """
    arms = arms_of(records)
    metrics = metrics_of(finding.ranked, records)
    seeds = set.intersection(*(set(by_seed) for by_seed in arms.values())) if arms else set()
    if not metrics or not seeds or len(arms) < 2:
        return {}
    values = np.array(
        [
            [by_seed[seed].scores[metric] for by_seed in arms.values()]
            for seed in sorted(seeds)
            for metric in metrics
        ]
    )
    above = (values[:, None] > values[:, :, None]).sum(axis=2)
    equal = (values[:, None] == values[:, :, None]).sum(axis=2)
    return dict(zip(arms, (above + (equal + 1) / 2).mean(axis=0).tolist(), strict=True))
