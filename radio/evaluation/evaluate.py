"""Measure a target by a task; one file per task, found by name."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

from radio.errors import RadioError
from radio.evaluation.fidelity import fidelity
from radio.evaluation.pictures import Pictures
from radio.evaluation.result import Options, Result
from radio.evaluation.targets import Target, resolve
from radio.progress import Report
from radio.training.checkpoint import newest_checkpoint

FIDELITY = "fidelity"
# A task is the function of its name in the module of its name, with _ for -.
TASKS = {
    FIDELITY: "how much of each teacher's features a run's student explains",
    "knn": "top 1 of the 20 nearest train pictures",
    "linear": "top 1 of a linear classifier",
    "zero-shot": "top 1 of the classes' names in a text tower",
    "retrieval": "recall of captions by pictures and the other way round",
    "segmentation": "mIoU of a linear classifier of patches",
    "masks": "IoU of masks decoded from a point or a box",
    "mode-switch": "how even the fidelity is over resolutions",
    "equivariance": "what scaling, shifting and tiling change",
    "rank": "RankMe",
    "similarity": "linear CKA between two targets",
}


# What measures a target on a data folder.
Task = Callable[[Target, Pictures, Options, Report | None], Result]


def evaluate(
    target: str | Path | Target,
    task: str = FIDELITY,
    data: str | Path | Pictures | None = None,
    progress: Report | None = None,
    options: Options | None = None,
) -> dict[str, Any]:
    """Return `{"task", "target", "score", "interval", "details"}` of a target on a task.

    Args:
        target: what `radio.evaluation.targets.resolve` takes; for fidelity a run folder or one of
            its `checkpoints/step-*`.
        task: a row of TASKS.
        data: a folder of train-*.tar and val-*.tar; for fidelity pictures to measure on, the run's
            own `data.val` when not given.
        progress: told (done, total) as the work goes on.
        options: what the task may be told; its defaults when not given.

    Raises:
        RadioError: an unknown task or target, or data without what the task needs.
    """
    check_tasks((task,))
    if task == FIDELITY:
        if isinstance(target, Target) or isinstance(data, Pictures):
            raise RadioError("fidelity takes the path of a run, and pictures by their path")
        path = Path(target)
        if not (path / "state.yaml").exists() and not newest_checkpoint(path / "checkpoints"):
            others = ", ".join(task for task in TASKS if task != FIDELITY)
            raise RadioError(
                f"'{target}' is neither a run folder with checkpoints nor a checkpoint, and "
                f"{FIDELITY}, the task where none is said, takes nothing else; say with --task "
                f"what to measure of an encoder, a teacher or a model: {others}"
            )
        seed = (options or Options()).seed
        return fidelity(path, None if data is None else str(data), progress, seed)
    (result,) = measure(target, (task,), data, options, progress)
    return result.as_dict()


def measure(
    target: str | Path | Target,
    tasks: Sequence[str],
    data: str | Path | Pictures | None,
    options: Options | None = None,
    progress: Report | None = None,
) -> Iterator[Result]:
    """Yield a target's result on each task; all but fidelity, arguments as `evaluate`."""
    check_tasks(tasks)
    if FIDELITY in tasks:
        raise RadioError(f"{FIDELITY} is measured alone: it takes a run, not a target")
    if data is None:
        raise RadioError(
            f"{', '.join(tasks)}: say with --data which folder of train-*.tar and val-*.tar to "
            "measure on"
        )
    pictures = data if isinstance(data, Pictures) else Pictures(data)
    measured = target if isinstance(target, Target) else resolve(target)
    for task in tasks:
        result = task_named(task)(measured, pictures, options or Options(), progress)
        yield result


def task_named(name: str) -> Task:
    """Return a task of TASKS but fidelity, importing its module only now."""
    own = name.replace("-", "_")
    return cast(Task, getattr(importlib.import_module(f"radio.evaluation.{own}"), own))


def check_tasks(tasks: Sequence[str]) -> None:
    """Refuse a name that is no row of TASKS, listing them."""
    for task in tasks:
        if task not in TASKS:
            raise RadioError(f"unknown task '{task}'; known: {', '.join(sorted(TASKS))}")
