"""A run's stream with its teachers placed on a cluster, which starts when it is first needed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager

from radio.config import Config
from radio.targets.cache import open_stream
from radio.targets.stream import Stream, open_sources
from ray_jobs.cluster import cluster
from ray_jobs.feature_stream import RayStream


@contextmanager
def ray_stream(config: Config) -> Iterator[Stream]:
    """Yield the stream; with a cache that holds every target no cluster is started."""
    sources = open_sources(config)  # a wrong path is said before a cluster is started
    with ExitStack() as held:

        def live() -> Stream:
            held.enter_context(cluster(config.cluster))
            return RayStream(config, sources)

        with closing(open_stream(config, live, sources)) as stream:
            yield stream
