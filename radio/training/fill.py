"""Fit, and with a cache make every target that the run will ask for, without a student."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from radio.config import Config
from radio.data.configured import training_plan
from radio.data.plan import Plan, StepSpec
from radio.progress import ProgressDisplay
from radio.targets.fit import fit
from radio.targets.stream import Stream
from radio.targets.target_maker import Request, StandardizerFile
from radio.training.pictures import report_spec
from radio.training.student_run import held_out_specs

Wanted = Sequence[tuple[Sequence[StepSpec], Request]]


def fit_and_fill(
    config: Config, stream: Stream, progress: ProgressDisplay
) -> dict[str, StandardizerFile]:
    """Return each teacher's fitted standardizer file; fill `cache`, if any, on the way.

    What is kept is what `radio train` of the same configuration reads: every view that its stages
    show once or more often, the held-out views, and those of the report, after which no teacher
    has to start.

    Raises:
        RadioError: as `fit`, or a cache that cannot be written.
    """
    progress.phase("fitting standardizers")
    files = fit(config, stream, progress.update)
    if config.cache is None:
        return files
    plan = training_plan(config, len(stream.sources["train"]))
    for number, stage in enumerate(config.stages):
        if stage.refit:
            files = {**files, **fit(config, stream, progress.update, number)}
        train = [plan(step) for step in _distinct(config, plan, number)]
        held_out = held_out_specs(config, plan, stream, files)
        if number == len(config.stages) - 1 and (shown := report_spec(plan, stream, files)):
            held_out.append(shown)
        wanted = [
            (train, Request("train", config.codec, files)),
            (held_out, Request("val", "float32", files)),
        ]
        _make(stream, wanted, f"targets of stage {number}", progress)
    return files


def _distinct(config: Config, plan: Plan, stage: int) -> Iterator[int]:
    """Yield the steps of a stage until its views come again."""
    steps = plan.steps_of(stage)
    per_epoch = plan.num_samples // plan.stages[stage].views_per_step
    yield from steps[: per_epoch * config.data.repeat_epochs]


def _make(stream: Stream, wanted: Wanted, phase: str, progress: ProgressDisplay) -> None:
    done, total = 0, sum(len(specs) for specs, _ in wanted)
    progress.phase(phase, total)
    for specs, request in wanted:
        for _ in stream.encode(specs, request):
            done += 1
            progress.update(done, total)
