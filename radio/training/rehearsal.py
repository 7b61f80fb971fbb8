"""A full-size rehearsal: every model of a run as large as it will be, on seeded weights, one step.

One teacher is in memory at a time. What each takes (parameters, FLOP, seconds, bytes shipped, peak
memory) goes into `out`/rehearsal.json; nothing is downloaded, and nothing else stays in `out`.
"""

from __future__ import annotations

import gc
import math
import tempfile
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from radio.config import Config
from radio.data.configured import training_plan
from radio.data.shards import ImageSource
from radio.errors import RadioError
from radio.progress import ProgressDisplay
from radio.targets.stream import assemble, open_sources, read_by, student_views
from radio.targets.target_maker import (
    Request,
    build_readers,
)
from radio.training.distill import students_of
from radio.training.learner import Learner
from radio.training.rehearsal_config import lowered
from radio.training.rehearsal_memory import (
    BUDGET,
    bytes_needed,
    gigabytes,
    millions,
    peak_bytes,
    reset_peak,
    room,
)
from radio.training.rehearsal_report import (
    Rehearsal,
    StudentRow,
    TeacherRow,
    write_rehearsal,
)
from radio.training.rehearsal_teacher import CPU, Heard, rehearse_teacher
from radio.training.step import training_step

LEARNING_BYTES = 12  # of a weight beside itself: its gradient and two moments, in float32


def rehearse(config: Config, budget: int = BUDGET) -> Rehearsal:
    """Run one step of the last stage at full size and write `out`/rehearsal.json.

    Args:
        config: the run's; `lowered` says what is made smaller.
        budget: bytes that this process may have. A teacher that does not fit in float32 is built
            in bfloat16, or else left out with the reason in its row; so is a student.

    Raises:
        RadioError: too few pictures, no room for any teacher, or a loss that is not finite.
    """
    started = time.perf_counter()
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory(prefix=".rehearsal-", dir=out) as scratch,
        ProgressDisplay() as progress,
    ):
        small = lowered(config, Path(scratch))
        torch.set_num_threads(small.threads.student)
        sources = open_sources(small)
        spec = training_plan(small, len(sources["train"]))(0)
        rows: list[TeacherRow] = []
        heard: dict[str, Heard] = {}
        for name in small.teachers:
            progress.phase(f"teacher {name}")
            row, heard[name] = rehearse_teacher(small, name, sources, spec, budget)
            rows.append(row)
            gc.collect()
        students = []
        for name, each in students_of(small).items():
            progress.phase(f"student {name}".strip())
            students.append(_rehearse_student(name, each, sources, heard, budget))
            gc.collect()
    views = {each.name: (len(each.views), *each.pixels) for each in spec.partitions}
    seconds = time.perf_counter() - started
    result = Rehearsal(views, small.threads.student, seconds, rows, students)
    write_rehearsal(out / "rehearsal.json", result)
    return result


def _rehearse_student(
    name: str,
    config: Config,
    sources: Mapping[str, ImageSource],
    heard: Mapping[str, Heard],
    budget: int,
) -> StudentRow:
    """Build a student and take one training step on what the teachers said."""
    plan = training_plan(config, len(sources["train"]))
    spec, request = plan(0), Request("train", config.codec, {})
    coded = [
        {who: target for who, each in heard.items() if (target := each.coded[at]) is not None}
        for at in range(len(spec.partitions))
    ]
    if not any(coded):
        raise RadioError(
            "no teacher fits into the memory that is free here; rehearse on a machine with more, "
            "or with smaller teachers"
        )
    reset_peak()
    started = time.perf_counter()
    learner = Learner(config, {who: each.facts for who, each in heard.items()}, CPU)
    built = time.perf_counter()
    student = learner.student
    row = StudentRow(name, millions(student), millions(student.backbone), built - started)
    needed, available = bytes_needed(row.parameters_m * 1e6, LEARNING_BYTES), room(budget)
    if needed > available:
        reason = f"needs {gigabytes(needed)} to learn, and {gigabytes(available)} are free"
        return replace(row, skipped=reason, peak_bytes=peak_bytes())
    learner.dispersions.update(
        {who: each.dispersion for who, each in heard.items() if each.dispersion is not None}
    )
    views = student_views(spec, read_by(build_readers(config, sources)["train"]), config)
    batch = assemble(spec, views, coded, request, 0.0)
    student.train()
    started = time.perf_counter()
    losses = training_step(learner, batch, config, plan, CPU)
    seconds = time.perf_counter() - started
    return replace(
        row, step_seconds=seconds, peak_bytes=peak_bytes(), losses=_finite(losses, learner)
    )


def _finite(losses: Mapping[str, Tensor], learner: Learner) -> dict[str, float]:
    """Return the losses as numbers; they and the weights after the step must be finite."""
    values = {name: float(loss) for name, loss in losses.items()}
    bad = [name for name, value in values.items() if not math.isfinite(value)]
    bad += [
        name
        for name, weight in learner.student.named_parameters()
        if not bool(torch.isfinite(weight).all())
    ]
    if bad:
        raise RadioError(
            f"after one step NaN or infinity is in {', '.join(bad[:5])}; lower optimizer.lr, or "
            "look at student.precision and the weights of the losses"
        )
    return values
