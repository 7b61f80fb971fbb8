"""The training loop: fit, resume, train stage by stage, evaluate, report."""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from radio.config import Config, check, teachers_of
from radio.data.plan import Plan, StepSpec, training_plan
from radio.errors import RadioError
from radio.progress import ProgressDisplay, told
from radio.targets.fit import fit, read_dispersions, read_fitted
from radio.targets.standardize import Standardizer
from radio.targets.stream import LocalStream, StepBatch, Stream, device_of
from radio.targets.target_maker import Request, StandardizerFile
from radio.training.checkpoint import (
    load_checkpoint,
    newest_checkpoint,
    save_checkpoint,
)
from radio.training.learner import Learner
from radio.training.metrics import Row, describe, held_out_rows
from radio.training.pictures import report_pictures
from radio.training.report import write_report
from radio.training.run_folder import RunFolder, open_run
from radio.training.step import training_step
from radio.training.stop import StopSignal

log = logging.getLogger("radio.train")
HELD_OUT_BATCH = 16  # views of a held-out batch; a teacher's micro-batches are inside it


@dataclass(frozen=True)
class RunResult:
    """What a finished (or stopped) run left: its folder, step, held-out table and damage."""

    out: Path
    step: int
    finished: bool
    before: list[Row]
    after: list[Row]
    damaged: dict[str, str]


def distill(config: Config, stream: Stream | None = None) -> RunResult:
    """Train the student of `config`; the same call resumes `config.out` exactly.

    Args:
        config: a checked configuration (`radio.config.load`).
        stream: where targets come from; a LocalStream is built when none is given.

    Raises:
        RadioError: anything the user can mend, naming the thing and the way out.
    """
    check(config)
    with open_run(config) as run, ProgressDisplay() as progress:
        progress.phase("waiting for teachers")
        with _local_unless(stream, config) as source:
            return _Run(config, source, run, progress).train()


@contextlib.contextmanager
def _local_unless(stream: Stream | None, config: Config) -> Iterator[Stream]:
    if stream is not None:
        yield stream  # the caller's; the caller closes it
        return
    with LocalStream(config) as local:
        yield local


class _Run:
    """One run between its folder and its stream."""

    def __init__(
        self, config: Config, stream: Stream, run: RunFolder, progress: ProgressDisplay
    ) -> None:
        self.config, self.stream, self.run, self.progress = config, stream, run, progress
        torch.set_num_threads(config.threads.student)
        self.device = device_of(config)
        self.plan: Plan = training_plan(config, len(stream.sources["train"]))
        self.learner = Learner(config, stream.teachers, self.device)
        self.files: dict[str, StandardizerFile] = {}  # those in force, by teacher
        self.standardizers: dict[str, Standardizer] = {}
        self.damaged: dict[str, str] = {}
        self.num_damaged_views = 0
        self.incarnation = 1
        self.losses: dict[str, Tensor] = {}  # of the last step, still on the device
        self.rows: list[Row] = []  # of the last held-out evaluation
        self.logged = (0, time.perf_counter())

    def train(self) -> RunResult:
        """Resume, fit, train stage by stage, evaluate, report."""
        config, plan = self.config, self.plan
        start = self._resume()
        self._fit(0)
        for number in range(1, len(plan.stages)):
            if config.stages[number].refit and plan.steps_of(number)[0] < start:
                self._fit(number)
        before = self._rows_of(0) or self._evaluate(0)
        self.rows = self._rows_of(start) or before
        step = start
        with StopSignal() as stop:
            for step in self._steps(start):
                due = step % config.checkpoint.every_steps == 0
                if due or stop.requested or step == plan.num_steps:
                    self._save(step)
                if stop.requested:
                    log.warning("stopped, step %d is saved; the same command resumes there", step)
                    raise KeyboardInterrupt
                every = config.evaluation.every_steps
                if every and step % every == 0 and step < plan.num_steps:
                    self.rows = self._evaluate(step)
                    self._begin_training(step)
        after = self._rows_of(step) or self._evaluate(step)
        self._report()
        if start == plan.num_steps:
            log.info("%s is finished at step %d; nothing to train", self.run.path, start)
        return RunResult(self.run.path, step, True, before, after, self.damaged)

    def _fit(self, stage: int) -> None:
        """Put a stage's standardizers in force, fitting those that are not there yet."""
        self.progress.phase("fitting standardizers", self.config.fit.steps)
        files = fit(self.config, self.stream, self.progress.update, stage)
        self.files.update(files)
        self.standardizers.update(read_fitted(files))
        self.learner.dispersions.update(read_dispersions(files))

    def _refit(self, stage: int) -> None:
        """Fit again before a stage; what the adaptors say in the teachers' spaces stays."""
        earlier = dict(self.standardizers)
        self._fit(stage)
        for name in sorted(earlier.keys() & teachers_of(self.config.stages[stage])):
            self.learner.refit(name, earlier[name], self.standardizers[name])

    def _steps(self, start: int) -> Iterator[int]:
        """Train from step `start` to the end, yielding the number of finished steps."""
        config, plan = self.config, self.plan
        for number, stage in enumerate(config.stages):
            steps = [step for step in plan.steps_of(number) if step >= start]
            if stage.refit and len(steps) == stage.steps:
                self._refit(number)
            request = Request("train", config.codec, dict(self.files))
            specs = (plan(step) for step in steps)
            self.learner.student.train()
            self._begin_training(max(start, plan.steps_of(number).start))
            for batch in self.stream.read(specs, request, self.incarnation):
                self.losses = training_step(self.learner, batch, config, plan, self.device)
                done = batch.step + 1
                self._count_damage(batch)
                if done % config.log_every_steps == 0 or done == plan.num_steps:
                    self._log(done, batch)
                yield done

    def _begin_training(self, step: int) -> None:
        self.progress.phase("training", self.plan.num_steps)
        self.logged = (step, time.perf_counter())

    def _log(self, done: int, batch: StepBatch) -> None:
        losses = self._finite_losses(done)
        last, clock = self.logged
        self.logged = (done, time.perf_counter())
        seconds = (self.logged[1] - clock) / (done - last)
        wait_share = min(1.0, batch.wait_seconds / seconds)
        rate = batch.num_images / seconds
        self.run.append(
            {
                "step": done,
                "losses": losses,
                "seconds": seconds,
                "images_per_second": rate,
                "wait_share": wait_share,
                "busy_seconds": dict(batch.busy_seconds),
                "damaged": len(self.damaged),
            }
        )
        self.progress.update(
            done, self.plan.num_steps, describe(losses, rate, wait_share, self.rows)
        )

    def _finite_losses(self, done: int) -> dict[str, float]:
        """Return the last step's losses as numbers; a NaN names its teacher and stops the run."""
        values = torch.stack(list(self.losses.values())).tolist()  # the only wait for the device
        for name, value in zip(self.losses, values, strict=True):
            if not math.isfinite(value):
                raise RadioError(
                    f"the loss {name} is {value} in step {done}; nothing was saved since the last "
                    "checkpoint. Lower optimizer.lr, or look at that teacher's features"
                )
        return dict(zip(self.losses, values, strict=True))

    def _count_damage(self, batch: StepBatch) -> None:
        self.damaged.update(batch.damaged)
        self.num_damaged_views += len(batch.damaged)
        seen = (batch.step + 1) * batch.num_images
        allowed = self.config.data.max_damaged * max(seen, 1000)
        if self.num_damaged_views > allowed:
            some = "".join(f"\n  {key}: {why}" for key, why in list(self.damaged.items())[:5])
            raise RadioError(
                f"{self.num_damaged_views} damaged views in {seen}, more than data.max_damaged="
                f"{self.config.data.max_damaged} allows:{some}\nmend the data or raise the limit"
            )

    def _resume(self) -> int:
        """Restore the newest checkpoint and return its step, or 0."""
        path = newest_checkpoint(self.run.checkpoints)
        if path is None:
            self.run.cut(0)
            return 0
        checkpoint = load_checkpoint(path)
        self._refuse_other_inputs(checkpoint.state)
        self.learner.load(checkpoint.tensors)
        self.run.cut(checkpoint.step)
        self.incarnation = int(checkpoint.state["incarnation"]) + 1
        self.damaged = dict(checkpoint.state["damaged"])
        self.num_damaged_views = int(checkpoint.state["num_damaged_views"])
        if checkpoint.state["threads"] != asdict(self.config.threads):
            log.warning("another number of threads than before: low bits may differ from now on")
        log.info("resuming %s at step %d", self.run.path, checkpoint.step)
        return checkpoint.step

    def _refuse_other_inputs(self, state: Mapping[str, Any]) -> None:
        for name, facts in self.stream.teachers.items():
            if state["teachers"][name]["fingerprint"] != facts.fingerprint:
                raise RadioError(
                    f"teacher '{name}' has other weights or options than when {self.run.path} was "
                    "trained; give it back its weights, or choose another out="
                )
        if state["data"] != self.stream.sources["train"].fingerprint:
            raise RadioError(
                f"data.train={self.config.data.train} holds other pictures than when "
                f"{self.run.path} was trained; restore them, or choose another out="
            )

    def _save(self, step: int) -> None:
        self._finite_losses(step)  # broken weights must not replace whole ones
        state = {
            "incarnation": self.incarnation,
            "threads": asdict(self.config.threads),
            "teachers": {name: asdict(facts) for name, facts in self.stream.teachers.items()},
            "data": self.stream.sources["train"].fingerprint,
            "damaged": self.damaged,
            "num_damaged_views": self.num_damaged_views,
            "versions": {"torch": str(torch.__version__)},
        }
        folder, keep = self.run.checkpoints, self.config.checkpoint.keep
        tensors = self.learner.tensors()
        save_checkpoint(folder, step, tensors, self.standardizers, self.config, state, keep)

    def _evaluate(self, step: int) -> list[Row]:
        if "val" not in self.stream.sources:
            return []
        num_views = min(self.config.evaluation.views, len(self.stream.sources["val"]))
        partitions = self.plan.held_out(num_views, HELD_OUT_BATCH, self.files)
        specs = [StepSpec(at, 0, 0, (partition,)) for at, partition in enumerate(partitions)]
        self.progress.phase("held-out fidelity", len(specs))
        request = Request("val", "float32", dict(self.files))
        batches = self.stream.read(specs, request, self.incarnation)
        rows = held_out_rows(
            self.learner.result, told(batches, len(specs), self.progress.update), self.device
        )
        self.run.append({"step": step, "held_out": [row.as_dict() for row in rows]})
        return rows

    def _report(self) -> None:
        request = Request("val", "float32", dict(self.files))
        pictures = report_pictures(
            self.learner.result, self.stream, self.plan, request, self.incarnation, self.device
        )
        write_report(self.run.path, pictures)

    def _rows_of(self, step: int) -> list[Row]:
        """Return the held-out rows that an earlier start already measured at `step`."""
        for record in self.run.records():
            if record["step"] == step and "held_out" in record:
                return [Row(**row) for row in record["held_out"]]
        return []
