"""`radio train stream=ray`: place the teachers, then train in this process, or in `workers`."""

from __future__ import annotations

from radio.config import Config
from radio.training.distill import distill
from radio.training.student_run import RunResult
from ray_jobs.placed import ray_stream


def train(config: Config) -> RunResult:
    """Distil with teachers in Ray actors; the cluster is joined, or made for the run."""
    if config.parallel.workers is not None:
        from ray_jobs.students import train_with_workers  # Ray Train takes seconds to import

        return train_with_workers(config)
    with ray_stream(config) as stream:
        return distill(config, stream)
