"""`radio fit stream=ray`: fit the standardizers with the teachers in Ray actors."""

from __future__ import annotations

from radio.config import Config
from radio.progress import Report
from radio.targets.fit import fit
from radio.targets.stream import open_sources
from radio.targets.target_maker import StandardizerFile
from ray_jobs.cluster import cluster
from ray_jobs.feature_stream import RayStream


def fit_on_ray(config: Config, progress: Report | None = None) -> dict[str, StandardizerFile]:
    """Return each teacher's fitted standardizer file."""
    sources = open_sources(config)  # a wrong path is said before a cluster is started
    with cluster(config.cluster), RayStream(config, sources) as stream:
        return fit(config, stream, progress)
