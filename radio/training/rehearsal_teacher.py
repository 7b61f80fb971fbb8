"""One teacher in a rehearsal: built at full size, fitted, asked for its part of the step."""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from radio.config import Config
from radio.data.plan import StepSpec
from radio.data.shards import ImageSource
from radio.data.views import ViewReader
from radio.targets.fit import fit, read_dispersions, read_fitted
from radio.targets.stream import LocalStream
from radio.targets.target_maker import (
    CodedTarget,
    Request,
    TargetMaker,
    TeacherFacts,
    build_readers,
    build_target_maker,
    maker_of,
)
from radio.training.rehearsal_config import alone
from radio.training.rehearsal_memory import (
    BFLOAT16,
    FLOAT32,
    bytes_needed,
    draw_half,
    gigabytes,
    millions,
    peak_bytes,
    reset_peak,
    room,
    without_weights,
)
from radio.training.rehearsal_report import TargetRow, TeacherRow
from teachers import Teacher, build_teacher

log = logging.getLogger("radio.rehearsal")
CPU = torch.device("cpu")


class LeftOut(Exception):
    """A teacher is not built; the message is the reason."""


@dataclass(frozen=True)
class Heard:
    """What stays of a teacher once it is freed: facts, each partition's target, its spread."""

    facts: TeacherFacts
    coded: Sequence[CodedTarget | None]
    dispersion: float | None = None


def one_forward(teacher: Teacher) -> tuple[float, float]:
    """Return (GFLOP as 2 x MAC, seconds) of one picture of the native size."""
    side = teacher.native_size // teacher.stride * teacher.stride
    pixels = torch.zeros(1, 3, side, side)
    # torch has no formula for two of the CPU's kernels, which would count as nothing: that of fused
    # attention gets one, that of a whole nn.MultiheadAttention is switched off.
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    counter = FlopCounterMode(display=False, custom_mapping={kernel: _attention_flop})
    fast = torch.backends.mha.get_fastpath_enabled()
    started = time.perf_counter()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with counter:
            teacher(pixels)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    return counter.get_total_flops() / 1e9, time.perf_counter() - started


def _attention_flop(
    query: torch.Size, key: torch.Size, value: torch.Size, *_: object, **__: object
) -> int:
    flop: int = sdpa_flop_count(query, key, value)
    return flop


def rehearse_teacher(
    config: Config, name: str, sources: Mapping[str, ImageSource], spec: StepSpec, budget: int
) -> tuple[TeacherRow, Heard]:
    """Build a teacher, fit its standardizer, make its targets of the step, and let it go."""
    card = config.teachers[name].card
    row = TeacherRow(name, card.parameters_m, card.gflops, card.feature_dim)
    reset_peak()
    clock = [time.perf_counter()]
    try:
        maker = _maker(config, name, build_readers(config, sources), room(budget))
    except LeftOut as reason:
        log.warning("teacher '%s' is left out: %s", name, reason)
        kind = config.teachers[name].kind
        facts = TeacherFacts(kind, "left out", card.summary_dim, card.feature_dim)
        return replace(row, skipped=str(reason)), Heard(facts, [None] * len(spec.partitions))
    clock.append(time.perf_counter())
    gflops, forward_seconds = one_forward(maker.teacher)
    clock.append(time.perf_counter())
    lone = alone(config, name)
    with LocalStream(lone, {name: maker.facts}) as stream:
        stream.makers[name] = maker
        files = fit(lone, stream)
    clock.append(time.perf_counter())
    request = Request("train", config.codec, files)
    coded = [
        maker(partition, request) if name in partition.modes else None
        for partition in spec.partitions
    ]
    clock.append(time.perf_counter())
    build, _, fitting, step = (end - start for start, end in itertools.pairwise(clock))
    measured = replace(
        row,
        precision=str(next(maker.teacher.parameters()).dtype).removeprefix("torch."),
        parameters_m=millions(maker.teacher),
        gflops=gflops,
        build_seconds=build,
        forward_seconds=forward_seconds,
        fit_seconds=fitting,
        fit_positions=read_fitted(files)[name].count,
        step_seconds=step,
        peak_bytes=peak_bytes(),
        targets={
            partition.name: _target_row(target)
            for partition, target in zip(spec.partitions, coded, strict=True)
            if target is not None
        },
    )
    return measured, Heard(maker.facts, coded, read_dispersions(files).get(name))


def _maker(
    config: Config, name: str, readers: Mapping[str, ViewReader], available: int
) -> TargetMaker:
    """Build a teacher in float32 or, where that has no room, in bfloat16."""
    wanted = config.teachers[name]
    parameters = wanted.card.parameters_m * 1e6
    if bytes_needed(parameters, FLOAT32) <= available:
        return build_target_maker(config, name, readers, CPU)
    needed = bytes_needed(parameters, BFLOAT16)
    if needed > available:
        raise LeftOut(f"needs {gigabytes(needed)} in bfloat16, and {gigabytes(available)} are free")
    try:
        with without_weights():
            teacher = build_teacher(wanted.kind, name, dict(wanted.options), None, config.seed)
    # What torch raises where a library moves weights that are not there.
    except NotImplementedError as error:
        needed = bytes_needed(parameters, FLOAT32)
        raise LeftOut(
            f"needs {gigabytes(needed)}, {gigabytes(available)} are free, and its library does not "
            "build it in bfloat16"
        ) from error
    return maker_of(config, name, draw_half(teacher, config.seed), readers, CPU)


def _target_row(target: CodedTarget) -> TargetRow:
    summary = None if target.summary is None else target.summary.shape
    arrays = [target.features, target.valid, *([] if target.summary is None else [target.summary])]
    return TargetRow(summary, target.features.shape, sum(array.nbytes for array in arrays))
