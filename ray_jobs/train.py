"""`radio train stream=ray`: place the teachers, then train in this process."""

from __future__ import annotations

from radio.config import Config
from radio.training.distill import distill
from radio.training.student_run import RunResult
from ray_jobs.placed import ray_stream


def train(config: Config) -> RunResult:
    """Distil with teachers in Ray actors; the cluster is joined, or made for the run."""
    with ray_stream(config) as stream:
        return distill(config, stream)
