"""All workers of a run: a pool per teacher and the feeders, started once, used by many students."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, remove_placement_group

from radio.config import Config
from radio.data.shards import ImageSource
from radio.targets.target_maker import TeacherFacts
from ray_jobs.placement import feeders_of, replicas_of, wait_until_ready
from ray_jobs.pool import Pool

FEEDERS = "feeders"


@dataclass
class Workers:
    """Handles of started workers, which may be sent to other processes, and teachers' facts.

    `sources` is a reference to the pictures' index, inside a list, which every call takes along.
    """

    sources: list[Any]
    replicas: dict[str, list[Any]]
    feeders: list[Any]
    facts: dict[str, TeacherFacts] = field(default_factory=dict)
    groups: list[PlacementGroup] = field(default_factory=list)

    @classmethod
    def start(cls, config: Config, sources: Mapping[str, ImageSource]) -> Workers:
        """Start every worker and wait until all are there.

        Raises:
            RadioError: a teacher cannot be built, or a worker has no place.
        """
        workers = cls([ray.put(dict(sources))], {}, [])
        try:
            for name in config.teachers:
                workers.replicas[name], groups = replicas_of(config, name)
                workers.groups += groups
            workers.feeders, groups = feeders_of(config)
            workers.groups += groups
            starting = dict(workers.replicas)
            if workers.feeders:
                starting[FEEDERS] = workers.feeders
            said = wait_until_ready(config, starting, workers.sources)
            workers.facts = {name: said[name] for name in config.teachers}
        except BaseException:
            workers.close()
            raise
        return workers

    def connect(
        self, config: Config, rank: int = 0, ranks: int = 1
    ) -> tuple[Pool | None, dict[str, Pool]]:
        """Return this process's own view of the feeders, if any, and of each teacher's pool.

        Students begin with different replicas, and are patient with replicas that may have work of
        all `ranks` of them, as each knows its own calls alone.
        """
        cluster, greeting = config.cluster, (self.sources,)
        limits = cluster.call_timeout_seconds, cluster.give_up_seconds
        hedge = None if cluster.hedge is None else cluster.hedge * ranks
        feeders = None
        if self.feeders:  # half the time, so that a hung feeder is not taken for a hung teacher
            feeders = Pool("a feeder", self.feeders, limits[0] / 2, limits[1], greeting=greeting)
        pools = {}
        for name, handles in self.replicas.items():
            first = rank % len(handles)
            pools[name] = Pool(
                f"teacher '{name}'",
                [*handles[first:], *handles[:first]],
                *limits,
                hedge,
                self.facts[name],
                feeders,
                greeting,
            )
        return feeders, pools

    def close(self) -> None:
        """End every worker for good."""
        for handles in (*self.replicas.values(), self.feeders):
            for handle in handles:
                ray.kill(handle)
        for group in self.groups:
            remove_placement_group(group)
