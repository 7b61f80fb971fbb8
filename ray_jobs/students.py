"""Several student processes under Ray Train, started again where one dies.

Ray Train places the processes and connects them; what they compute, and where they resume, is said
by `distill` and the run's own checkpoints alone.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ray

from radio.config import Config
from radio.data.shards import ImageSource
from radio.errors import RadioError
from radio.targets.cache import open_stream
from radio.targets.stream import Stream, device_of, open_sources
from radio.training.checkpoint import newest_checkpoint
from radio.training.distill import distill
from radio.training.parallel import PATIENCE
from radio.training.stop import asked_by_file
from radio.training.student_run import RunResult, result_of
from ray_jobs.cluster import cluster
from ray_jobs.feature_stream import RayStream
from ray_jobs.workers import Workers

log = logging.getLogger("ray_jobs")
RESTARTS = 3  # without a new checkpoint in between


class Keeper:
    """Starts the teachers when the first student asks for them, and keeps a mistake's message.

    With a cache that holds every target no student asks, and no teacher starts.
    """

    def __init__(self, config: Config, sources: Mapping[str, ImageSource], home: str) -> None:
        if Path(home).is_dir():
            os.chdir(home)
        self.config, self.sources = config, sources
        self._workers: Workers | None = None
        self._mistake: str | None = None

    def workers(self) -> Workers:
        """Return the handles of teachers and feeders, which are started at the first call."""
        if self._workers is None:
            self._workers = Workers.start(self.config, self.sources)
        return self._workers

    def note(self, mistake: str) -> None:
        """Keep what the user has to mend; processes that are started again then end at once."""
        self._mistake = self._mistake or mistake

    def mistake(self) -> str | None:
        """Return what was kept."""
        return self._mistake


def train_with_workers(config: Config) -> RunResult:
    """Distil with `parallel.workers` student processes, the teachers in Ray actors.

    Raises:
        RadioError: a mistake of the user's, or processes that die again and again.
        KeyboardInterrupt: stopped between two steps, after a checkpoint.
    """
    from ray.train import RunConfig, ScalingConfig  # six seconds
    from ray.train.torch import TorchConfig, TorchTrainer

    sources = open_sources(config)
    out = Path(config.out).resolve()
    with cluster(config.cluster), asked_by_file(out) as stop:
        keeper: Any = ray.remote(Keeper).options(num_cpus=0).remote(config, sources, os.getcwd())
        told = {"config": config, "sources": sources, "keeper": keeper, "home": os.getcwd()}
        cuda = device_of(config).type == "cuda"
        least, most = config.parallel.min_workers, config.parallel.workers
        workers: Any = most if least is None else (least, most)  # a pair is elastic
        for attempt in _attempts(out):
            trainer = TorchTrainer(
                _student,
                train_loop_config=told,
                torch_config=TorchConfig(
                    "cpu:gloo,cuda:nccl" if cuda else "gloo",
                    timeout_s=int(PATIENCE.total_seconds()),
                ),
                scaling_config=ScalingConfig(
                    num_workers=workers,
                    use_gpu=cuda,
                    resources_per_worker={"CPU": 1, **({"GPU": 1} if cuda else {})},
                ),
                run_config=RunConfig(name=f"start-{attempt}", storage_path=str(out / "ray_train")),
            )
            error = _fit(trainer)
            mistake = ray.get(keeper.mistake.remote())
            if mistake is not None:
                raise RadioError(mistake)
            if error is None:
                break
            log.warning("a student process died (%s); starting them again", error)
        result = result_of(config)
        if stop.requested or not result.finished:
            raise KeyboardInterrupt
        return result


def _attempts(out: Path) -> Any:
    """Yield the numbers of starts, until RESTARTS of them end without a new checkpoint.

    Raises:
        RadioError: they did.
    """
    attempt, before, vain = 0, newest_checkpoint(out / "checkpoints"), 0
    while vain <= RESTARTS:
        yield attempt
        newest = newest_checkpoint(out / "checkpoints")
        vain = 0 if newest != before else vain + 1
        attempt, before = attempt + 1, newest
    raise RadioError(
        f"the student's processes died {vain} times without a new checkpoint; see the Ray logs, "
        f"and {out / 'ray_train'} (is a node out of memory?)"
    )


def _fit(trainer: Any) -> str | None:
    """Run the processes to their end; return in a line what killed one."""
    from ray.train import TrainingFailedError

    try:
        trainer.fit()
    except TrainingFailedError as error:
        return " ".join(str(error).split())[:300]
    return None


def _student(told: dict[str, Any]) -> None:
    """Train as one of the processes; a mistake of the user's ends all of them for good."""
    config, keeper = told["config"], told["keeper"]
    if Path(told["home"]).is_dir():
        os.chdir(told["home"])
    if ray.get(keeper.mistake.remote()) is not None:
        return

    def live() -> Stream:
        try:
            workers = ray.get(keeper.workers.remote())
        except ray.exceptions.RayTaskError as error:
            raise (error.cause if isinstance(error.cause, RadioError) else error) from None
        return RayStream(config, told["sources"], workers)

    try:
        stream = open_stream(config, live, told["sources"])
        try:
            distill(config, stream)
        finally:
            stream.close()
    except RadioError as error:
        ray.get(keeper.note.remote(str(error)))
        raise
    except KeyboardInterrupt:
        log.info("stopped")  # between two steps; no failure to be started again for
