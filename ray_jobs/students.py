"""Several student processes under Ray Train, started again where one dies.

Ray Train places the processes and connects them; what they compute, and where they resume, is said
by `distill` and the run's own checkpoints alone.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from radio.config import Config
from radio.data.configured import training_plan
from radio.data.shards import ImageSource
from radio.errors import RadioError
from radio.progress import ProgressDisplay
from radio.targets.cache import open_stream
from radio.targets.stream import Stream, open_sources
from radio.training.checkpoint import newest_checkpoint
from radio.training.distill import distill, students_of
from radio.training.metrics import describe
from radio.training.parallel import PATIENCE
from radio.training.run_folder import RunFolder, hold
from radio.training.stop import asked_by_file
from radio.training.student_run import RunResult, result_of
from ray_jobs.cluster import cluster
from ray_jobs.elastic import Growth, count_places, student_bundle
from ray_jobs.feature_stream import RayStream
from ray_jobs.workers import Workers

log = logging.getLogger("ray_jobs")
RESTARTS = 3  # without a new checkpoint in between
LOOK_SECONDS = 0.5
STARTED = ".started"  # held by whoever started the processes; the run itself is held by the first
GROUP_TRIES = 3  # of Ray Train to place processes for which there was room


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
        if self._mistake is not None:  # another student has asked before
            raise RadioError(self._mistake)
        if self._workers is None:
            try:
                self._workers = Workers.start(self.config, self.sources)
            except RadioError as error:
                self._mistake = str(error)
                raise
        return self._workers

    def teachers_run(self) -> bool:
        """Return whether teachers and feeders have been started."""
        return self._workers is not None

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
    sources = open_sources(config)
    out = Path(config.out).resolve()
    steps = training_plan(config, len(sources["train"])).num_steps
    with (
        hold(out, STARTED),
        cluster(config.cluster),
        asked_by_file(out) as stop,
        ProgressDisplay() as progress,
    ):
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        kept: Any = ray.remote(Keeper).options(num_cpus=0, scheduling_strategy=here)
        keeper = kept.remote(config, sources, os.getcwd())  # whoever owns the teachers stays
        told = {"config": config, "sources": sources, "keeper": keeper, "home": os.getcwd()}
        run, died = RunFolder(out), list[str]()
        shown = _Shown(run, progress, steps)
        for attempt in _attempts(out, died):
            progress.phase("the student's processes", steps)
            count = count_places(config, ray.get(keeper.teachers_run.remote()))
            trainer = _trainer(config, told, out / "ray_train", attempt, count)
            with Growth(config, count, run) as growth:
                error = _fit(trainer, shown.look, growth.look)
            mistake = ray.get(keeper.mistake.remote())
            if mistake is not None:
                raise RadioError(mistake)
            if error is None and (stop.requested or not growth.found):
                break
            if error is not None:
                died.append(error)
                log.warning("a student process died (%s); starting them again", error)
        first, *others = map(result_of, students_of(config).values())
        result = replace(first, students=dict(zip(config.students, others, strict=True)))
        if stop.requested or not result.finished:
            raise KeyboardInterrupt
        return result


def _trainer(config: Config, told: dict[str, Any], folder: Path, attempt: int, count: int) -> Any:
    """Return Ray Train's trainer of a start with so many processes."""
    from ray.train.torch import TorchConfig, TorchTrainer  # six seconds
    from ray.train.v2.api.config import FailureConfig, RunConfig, ScalingConfig

    resources, labels = student_bundle(config)
    cuda = "GPU" in resources
    scaling = ScalingConfig(
        num_workers=count,
        use_gpu=cuda,
        resources_per_worker=resources,
        label_selector=labels or None,
    )
    run: Any = RunConfig(
        name=f"start-{attempt}",
        storage_path=str(folder),
        failure_config=FailureConfig(controller_failure_limit=GROUP_TRIES),
    )
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    return TorchTrainer(
        _student,
        train_loop_config=told,
        torch_config=TorchConfig(backend, timeout_s=int(PATIENCE.total_seconds())),
        scaling_config=scaling,
        run_config=run,
    )


def _attempts(out: Path, died: Sequence[str]) -> Iterator[int]:
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
        f"the student's processes died {vain} times without a new checkpoint, the last time of: "
        f"{died[-1]}; see the Ray logs, and {out / 'ray_train'}"
    )


def _fit(trainer: Any, *looks: Callable[[], None]) -> str | None:
    """Run the processes to their end, looking at them; return in a line what killed one.

    In a thread, since in the main one Ray Train takes Ctrl-C for itself and ends without a save.
    """
    from ray.train import TrainingFailedError

    with ThreadPoolExecutor(1) as thread:
        ended = thread.submit(trainer.fit)
        while not ended.done():
            wait([ended], timeout=LOOK_SECONDS)  # signals come in between
            for look in looks:
                look()
    try:
        ended.result()
    except TrainingFailedError as error:
        return " ".join(str(error).split())[:500]
    return None


class _Shown:
    """Shows each new step that the processes have noted."""

    def __init__(self, run: RunFolder, progress: ProgressDisplay, steps: int) -> None:
        self.run, self.progress, self.steps = run, progress, steps
        self._last = run.newest()

    def look(self) -> None:
        record = self.run.newest()
        if record is None or record == self._last:
            return
        self._last = record
        rate, wait_share = record["images_per_second"], record["wait_share"]
        text = describe(record["losses"], rate, wait_share, ())
        self.progress.update(record["step"], self.steps, text)


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
