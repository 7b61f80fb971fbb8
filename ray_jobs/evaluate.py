"""`radio evaluate --ray ADDRESS`: several tasks at the same time, each in its own process."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import ray

from radio.config import ClusterConfig
from radio.errors import RadioError
from radio.evaluation.evaluate import measure
from radio.evaluation.result import Options, Result
from radio.progress import Report, told
from ray_jobs.cluster import cluster

RETRIES = 3  # of a task whose process died


def _task(target: str, task: str, data: str | None, options: Options, home: str) -> Result:
    """Measure one task."""
    if Path(home).is_dir():
        os.chdir(home)
    (result,) = measure(target, (task,), data, options)
    return result


def measure_on_ray(
    target: str,
    tasks: Sequence[str],
    data: str | None,
    options: Options,
    progress: Report | None,
    config: ClusterConfig,
) -> Iterator[Result]:
    """Yield a target's result on each task in order; a task whose process dies is done again.

    `progress` is told the tasks that are done.

    Raises:
        RadioError: as `radio.evaluation.evaluate.measure`, at the task's turn.
    """
    with cluster(config):
        remote = ray.remote(_task).options(num_cpus=1, max_retries=RETRIES)
        refs = [remote.remote(target, task, data, options, os.getcwd()) for task in tasks]
        for ref in told(refs, len(refs), progress):
            try:
                result: Result = ray.get(ref)
            except ray.exceptions.RayTaskError as error:
                if isinstance(error.cause, RadioError):
                    raise error.cause from None
                raise
            except ray.exceptions.RayError as error:
                raise RadioError(
                    f"the process of a task died {RETRIES + 1} times ({type(error).__name__}); is "
                    "its node out of memory?"
                ) from error
            yield result
