"""One student's run: its folder, what is in force, its steps, checkpoints and measurements."""

from __future__ import annotations

import logging
import math
import shutil
import time
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from radio.config import Config, teachers_of
from radio.data.configured import training_plan
from radio.data.plan import Plan, StepSpec
from radio.data.ranks import Ranks
from radio.errors import RadioError
from radio.progress import ProgressDisplay, told
from radio.targets.fit import fit, read_dispersions, read_fitted
from radio.targets.standardize import Standardizer
from radio.targets.stream import StepBatch, Stream, device_of
from radio.targets.target_maker import Request, StandardizerFile
from radio.training.board import Board
from radio.training.checkpoint import (
    find_checkpoint,
    load_checkpoint,
    newest_checkpoint,
    save_checkpoint,
)
from radio.training.learner import Learner
from radio.training.metrics import Row, describe, held_out_rows
from radio.training.parallel import from_leader, leader_first, merged
from radio.training.pictures import report_pictures
from radio.training.report import write_report
from radio.training.run_folder import RunFolder
from radio.training.step import training_step

log = logging.getLogger("radio.train")
HELD_OUT_BATCH = 16  # views of a held-out batch; a teacher's micro-batches are inside it


@dataclass(frozen=True)
class RunResult:
    """What a finished (or stopped) run left: its folder, step, held-out table and damage.

    `students` are the results of those that learnt beside it.
    """

    out: Path
    step: int
    finished: bool
    before: list[Row]
    after: list[Row]
    damaged: dict[str, str]
    students: dict[str, RunResult] = field(default_factory=dict)


class StudentRun:
    """One student between its folder and the stream.

    Recipe: several students from one teacher pass; ours; students;
    tests/test_students.py::test_each_student_is_bit_equal_to_its_run_alone.

    Args:
        config: the run's, with this student in the place of `student`.
        stream: where held-out targets and those of a fit come from.
        run: the folder, held by this process.
        first: the folder of the first of several students, whose fits hold for all.
        progress: told what is done.
        ranks: this process among those that train the student.
    """

    def __init__(
        self,
        config: Config,
        stream: Stream,
        run: RunFolder,
        first: RunFolder,
        progress: ProgressDisplay,
        ranks: Ranks,
    ) -> None:
        self.config, self.stream, self.run, self.progress = config, stream, run, progress
        self.first, self.ranks = first, ranks
        self.device = device_of(config)
        self.plan: Plan = training_plan(config, len(stream.sources["train"]))
        self.learner = Learner(config, stream.teachers, self.device, ranks)
        self.files: dict[str, StandardizerFile] = {}  # those in force, by teacher
        self.standardizers: dict[str, Standardizer] = {}
        self.damaged: dict[str, str] = {}
        self.num_damaged_views = 0
        self.incarnation = 1
        self.losses: dict[str, Tensor] = {}  # of the last step, still on the device
        self.before: list[Row] = []
        self.rows: list[Row] = []  # of the last held-out evaluation
        self.logged = (0, time.perf_counter())
        self.saved = -1  # the step of the newest checkpoint that this process wrote
        self.start = self._resume()
        wanted = config.tensorboard and ranks.leads
        self.board = Board(run.path / "tensorboard", self.start) if wanted else None

    @property
    def finished(self) -> bool:
        """Whether there was nothing left to train."""
        return self.start == self.plan.num_steps

    @property
    def request(self) -> Request:
        """What the stages' targets are asked with."""
        return Request("train", self.config.codec, dict(self.files))

    def prepare(self) -> None:
        """Put the standardizers of all begun stages in force, and measure the untrained student."""
        self._fit(0)
        for number in range(1, len(self.plan.stages)):
            if self.config.stages[number].refit and self.plan.steps_of(number)[0] < self.start:
                self._fit(number)
        self.before = self.rows_of(0) or self.evaluate(0)
        self.rows = self.rows_of(self.start) or self.before

    def begin_stage(self, number: int) -> None:
        """Refit where the stage wants it and has not begun yet."""
        if self.config.stages[number].refit and self.plan.steps_of(number)[0] >= self.start:
            self._refit(number)
        self.learner.student.train()
        self._begin_training(max(self.start, self.plan.steps_of(number).start))

    def take(self, batch: StepBatch) -> None:
        """Train one step, and log, save and measure where it is due."""
        config, done = self.config, batch.step + 1
        batch = self._merging(batch)
        self.losses = training_step(self.learner, batch, config, self.plan, self.device)
        self._count_damage(batch)
        last = done == self.plan.num_steps
        if done % config.log_every_steps == 0 or last:
            self._log(done, batch)
        if done % config.checkpoint.every_steps == 0 or last:
            self.save(done)
        every = config.evaluation.every_steps
        if every and done % every == 0 and not last:
            self.rows = self.evaluate(done)
            self._begin_training(done)

    def _merging(self, batch: StepBatch) -> StepBatch:
        """Return the batch as this student merges tokens; the stream knows the first one's way."""
        stage = self.plan.stages[self.plan.locate(batch.step)[0]]
        merge = {partition.name: partition.merge_per_block for partition in stage.partitions}
        parts = (replace(part, merge_per_block=merge[part.name]) for part in batch.partitions)
        return replace(batch, partitions=tuple(parts))

    def finish(self) -> RunResult:
        """Measure and report the trained student."""
        step = self.plan.num_steps
        after = self.rows_of(step) or self.evaluate(step)
        self._report()
        if self.board is not None:
            self.board.close()
        if self.finished:
            log.info("%s is finished at step %d; nothing to train", self.run.path, step)
        return RunResult(self.run.path, step, True, self.before, after, self.damaged)

    def _fit(self, stage: int) -> None:
        """Put a stage's standardizers in force, fitting those that are not there yet."""
        self.progress.phase("fitting standardizers", self.config.fit.steps)
        files = leader_first(lambda: self._fitted(stage), self.ranks)
        self.files.update(files)
        self.standardizers.update(read_fitted(files))
        self.learner.dispersions.update(read_dispersions(files))

    def _fitted(self, stage: int) -> dict[str, StandardizerFile]:
        if self.first != self.run and self.run.leads:
            theirs, ours = (run.path / "standardizers" for run in (self.first, self.run))
            shutil.copytree(theirs, ours, dirs_exist_ok=True)
        return fit(self.config, self.stream, self.progress.update, stage, self.incarnation)

    def _refit(self, stage: int) -> None:
        """Fit again before a stage; what the adaptors say in the teachers' spaces stays."""
        earlier = dict(self.standardizers)
        self._fit(stage)
        for name in sorted(earlier.keys() & teachers_of(self.config.stages[stage])):
            self.learner.refit(name, earlier[name], self.standardizers[name])

    def _begin_training(self, step: int) -> None:
        self.progress.phase("training", self.plan.num_steps)
        self.logged = (step, time.perf_counter())

    def _log(self, done: int, batch: StepBatch) -> None:
        losses = self._finite_losses(done)
        last, clock = self.logged
        self.logged = (done, time.perf_counter())
        seconds = (self.logged[1] - clock) / (done - last)
        wait_share = min(1.0, batch.wait_seconds / seconds)
        rate = self.plan.views_of(batch.step) / seconds
        self._note(
            {
                "step": done,
                "losses": losses,
                "seconds": seconds,
                "images_per_second": rate,
                "wait_share": wait_share,
                "busy_seconds": dict(batch.busy_seconds),
                "waits": dict(batch.waits),
                "bytes": dict(batch.num_bytes),
                "damaged": len(self.damaged),
            }
        )
        self.progress.update(
            done, self.plan.num_steps, describe(losses, rate, wait_share, self.rows)
        )

    def _note(self, record: dict[str, Any]) -> None:
        self.run.append(record)
        if self.board is not None:
            self.board.add(record)

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
        damaged = merged(batch.damaged, self.ranks)
        self.damaged.update(damaged)
        self.num_damaged_views += len(damaged)
        seen = (batch.step + 1) * self.plan.views_of(batch.step)
        allowed = self.config.data.max_damaged * max(seen, 1000)
        if self.num_damaged_views > allowed:
            some = "".join(f"\n  {key}: {why}" for key, why in list(self.damaged.items())[:5])
            raise RadioError(
                f"{self.num_damaged_views} damaged views in {seen}, more than data.max_damaged="
                f"{self.config.data.max_damaged} allows:{some}\nmend the data or raise the limit"
            )

    def _resume(self) -> int:
        """Restore the newest checkpoint and return its step, or 0."""
        # The leader's word: a folder may look different elsewhere, or still be written to.
        path = from_leader(lambda: newest_checkpoint(self.run.checkpoints), self.ranks)
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

    def save(self, step: int) -> None:
        """Write a checkpoint, unless it is there already."""
        if step == self.saved:
            return
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
        if self.ranks.leads:
            save_checkpoint(folder, step, tensors, self.standardizers, self.config, state, keep)
        self.saved = step

    def evaluate(self, step: int) -> list[Row]:
        """Return and record the held-out rows of the student as it is; [] without `data.val`."""
        student = self.learner.whole_result()
        if "val" not in self.stream.sources or not self.ranks.leads:
            return []
        specs = held_out_specs(self.config, self.plan, self.stream, self.files)
        self.progress.phase("held-out fidelity", len(specs))
        request = Request("val", "float32", dict(self.files))
        batches = self.stream.read(specs, request, self.incarnation)
        rows = held_out_rows(student, told(batches, len(specs), self.progress.update), self.device)
        self._note({"step": step, "held_out": [row.as_dict() for row in rows]})
        return rows

    def _report(self) -> None:
        student = self.learner.whole_result()
        if not self.ranks.leads:
            return
        request = Request("val", "float32", dict(self.files))
        pictures = report_pictures(
            student, self.stream, self.plan, request, self.incarnation, self.device
        )
        write_report(self.run.path, pictures)

    def rows_of(self, step: int) -> list[Row]:
        """Return the held-out rows that an earlier start already measured at `step`."""
        return _rows_of(self.run, step)


def held_out_specs(
    config: Config, plan: Plan, stream: Stream, teachers: Collection[str]
) -> list[StepSpec]:
    """Return what is measured on `data.val`, a partition a step; [] without it."""
    if "val" not in stream.sources:
        return []
    num_views = min(config.evaluation.views, len(stream.sources["val"]))
    partitions = plan.held_out(num_views, HELD_OUT_BATCH, teachers)
    return [StepSpec(at, 0, 0, (partition,)) for at, partition in enumerate(partitions)]


def result_of(config: Config) -> RunResult:
    """Return the result of one student's run that other processes have trained, from its folder.

    Raises:
        RadioError: it has no checkpoint.
    """
    run = RunFolder(Path(config.out))
    checkpoint = find_checkpoint(run.path)
    done, planned = checkpoint.step, sum(stage.steps for stage in config.stages)
    before, after = _rows_of(run, 0), _rows_of(run, done)
    return RunResult(
        run.path, done, done == planned, before, after, dict(checkpoint.state["damaged"])
    )


def _rows_of(run: RunFolder, step: int) -> list[Row]:
    for record in run.records():
        if record["step"] == step and "held_out" in record:
            return [Row(**row) for row in record["held_out"]]
    return []
