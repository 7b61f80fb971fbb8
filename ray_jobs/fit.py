"""`radio fit stream=ray`: standardizers, and a cache full of targets, by teachers on Ray."""

from __future__ import annotations

from radio.config import Config
from radio.progress import ProgressDisplay
from radio.targets.target_maker import StandardizerFile
from radio.training.fill import fit_and_fill
from ray_jobs.placed import ray_stream


def fit_on_ray(config: Config, progress: ProgressDisplay) -> dict[str, StandardizerFile]:
    """Return each teacher's fitted standardizer file; with `cache` every target is made, too."""
    with ray_stream(config) as stream:
        return fit_and_fill(config, stream, progress)
