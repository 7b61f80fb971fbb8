"""The training loop: fit, resume, train stage by stage, evaluate, report."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Iterator
from pathlib import Path

import torch

from radio.checks import check
from radio.config import Config
from radio.data.ranks import Ranks
from radio.errors import RadioError
from radio.progress import ProgressDisplay
from radio.targets.cache import open_stream
from radio.targets.stream import LocalStream, Stream, device_of
from radio.targets.target_maker import TeacherFacts
from radio.training.parallel import from_leader, gathered, joined
from radio.training.run_folder import open_run
from radio.training.stop import FILE, StopSignal
from radio.training.student_run import RunResult, StudentRun

log = logging.getLogger("radio.train")


def distill(config: Config, stream: Stream | None = None) -> RunResult:
    """Train the student of `config`, and those of `students`; the same call resumes exactly.

    Args:
        config: a checked configuration (`radio.config.load`).
        stream: where targets come from; a LocalStream where none is given, with stream=local.

    Raises:
        RadioError: anything the user can mend, naming the thing and the way out.
    """
    check(config)
    if config.rehearsal:
        raise RadioError(
            "rehearsal=true trains nothing; use radio train, or radio.training.rehearsal.rehearse"
        )
    if stream is None and config.stream == "ray":
        raise RadioError(
            "stream=ray places the teachers on a cluster, which ray_jobs.train.train(config) and "
            "radio train do; for teachers in this process set stream=local"
        )
    torch.set_num_threads(config.threads.student)
    with contextlib.ExitStack() as held:
        ranks = held.enter_context(joined(config.parallel, device_of(config)))
        configs = students_of(config)
        folders = [held.enter_context(open_run(each, ranks.leads)) for each in configs.values()]
        progress = held.enter_context(ProgressDisplay())
        progress.phase("waiting for teachers")
        source = stream or held.enter_context(_local(config, ranks))
        runs = [
            StudentRun(each, source, folder, folders[0], progress, ranks)
            for each, folder in zip(configs.values(), folders, strict=True)
        ]
        _train(runs, source, ranks)
        first, *others = (run.finish() for run in runs)
        return dataclasses.replace(first, students=dict(zip(config.students, others, strict=True)))


def students_of(config: Config) -> dict[str, Config]:
    """Return each student's own run: the first at `out`, the others below `out/students`."""
    configs = {"": dataclasses.replace(config, students={})}
    for name, student in config.students.items():
        out = str(Path(config.out) / "students" / name)
        configs[name] = dataclasses.replace(configs[""], student=student, out=out)
    return configs


@contextlib.contextmanager
def _local(config: Config, ranks: Ranks) -> Iterator[Stream]:
    """Build the teachers here: all in the leading process, elsewhere those that its share needs."""
    leading: list[Stream] = []

    def facts_of_all() -> dict[str, TeacherFacts]:
        leading.append(open_stream(config, lambda: LocalStream(config)))
        return dict(leading[0].teachers)

    facts = from_leader(facts_of_all, ranks)
    stream = leading[0] if leading else open_stream(config, lambda: LocalStream(config, facts))
    with contextlib.closing(stream):
        yield stream


def _train(runs: list[StudentRun], stream: Stream, ranks: Ranks) -> None:
    """Train all students on the same batches, from the step of the one that is furthest behind."""
    first = runs[0]
    plan, start = first.plan, min(run.start for run in runs)
    ranks.check(plan)
    incarnation = max(run.incarnation for run in runs)  # they are one process to the teachers
    for run in runs:
        run.incarnation = incarnation
        run.prepare()
    with StopSignal(runs[0].run.path) as stop:
        for number, stage in enumerate(plan.stages):
            steps = [step for step in plan.steps_of(number) if step >= start]
            if not steps:
                continue
            for run in runs:
                run.begin_stage(number)
            specs = (ranks.share(plan(step), stage) for step in steps)
            for batch in stream.read(specs, first.request, incarnation):
                for run in runs:
                    if batch.step >= run.start:
                        run.take(batch)
                if any(gathered(stop.requested, ranks)):
                    _stop(runs, batch.step + 1)


def _stop(runs: list[StudentRun], step: int) -> None:
    """Save every student that has got this far, and end as Ctrl-C does."""
    for run in runs:
        if step > run.start:
            run.save(step)
    if runs[0].ranks.leads:
        (runs[0].run.path / FILE).unlink(missing_ok=True)  # all have seen it
    log.warning("stopped, step %d is saved; the same command resumes there", step)
    raise KeyboardInterrupt
