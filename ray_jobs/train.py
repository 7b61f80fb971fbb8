"""`radio train stream=ray`: place the teachers, then train in this process."""

from __future__ import annotations

from radio.config import Config
from radio.targets.stream import open_sources
from radio.training.distill import RunResult, distill
from ray_jobs.cluster import cluster
from ray_jobs.feature_stream import RayStream


def train(config: Config) -> RunResult:
    """Distil with teachers in Ray actors; the cluster is joined, or made for the run."""
    sources = open_sources(config)  # a wrong path is said before a cluster is started
    with cluster(config.cluster), RayStream(config, sources) as stream:
        return distill(config, stream)
