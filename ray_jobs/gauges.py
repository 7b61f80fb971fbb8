"""Who waits for whom, as Prometheus metrics of the cluster (`ray_radio_...`, by teacher)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ray.util.metrics import Counter, Gauge

from radio.targets.target_maker import CodedTarget
from ray_jobs.pool import Pool

KEYS = ("teacher",)


class Gauges:
    """Metrics of a stream; a counter's rate over time is a share of it."""

    def __init__(self, teachers: Iterable[str]) -> None:
        self._told = dict.fromkeys(teachers, (0, 0))
        self.in_flight = Gauge("radio_in_flight", "calls without an answer", KEYS)
        self.waited = Counter("radio_waited_seconds", "the student stood still for it", KEYS)
        self.busy = Counter("radio_busy_seconds", "the teacher's own work", KEYS)
        self.num_bytes = Counter("radio_bytes", "targets as they travelled", KEYS)
        self.retries = Counter("radio_retries", "work asked for again as it was lost", KEYS)
        self.hedges = Counter("radio_hedges", "work asked for twice as it took long", KEYS)

    def note(self, name: str, pool: Pool, made: Sequence[CodedTarget], waited: float) -> None:
        """Add a step of one teacher."""
        tags = {"teacher": name}
        self.in_flight.set(pool.in_flight, tags)
        _add(self.waited, waited, tags)
        _add(self.busy, sum(target.seconds for target in made), tags)
        _add(self.num_bytes, sum(target.num_bytes for target in made), tags)
        retries, hedges = self._told[name]
        _add(self.retries, pool.retries - retries, tags)
        _add(self.hedges, pool.hedges - hedges, tags)
        self._told[name] = pool.retries, pool.hedges


def _add(counter: Counter, value: float, tags: dict[str, str]) -> None:
    if value > 0:  # Ray refuses 0
        counter.inc(value, tags)
