"""`radio fit stream=ray`: fit the standardizers with the teachers in Ray actors."""

from __future__ import annotations

from radio.config import Config
from radio.progress import Report
from radio.targets.fit import fit
from radio.targets.target_maker import StandardizerFile
from ray_jobs.placed import ray_stream


def fit_on_ray(config: Config, progress: Report | None = None) -> dict[str, StandardizerFile]:
    """Return each teacher's fitted standardizer file."""
    with ray_stream(config) as stream:
        return fit(config, stream, progress)
