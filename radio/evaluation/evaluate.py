"""Measure a target by a task; one file per task, found by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from radio.errors import RadioError
from radio.evaluation.fidelity import fidelity
from radio.progress import Report

TASKS = {"fidelity": fidelity}


def evaluate(
    target: str | Path,
    task: str = "fidelity",
    data: str | None = None,
    progress: Report | None = None,
) -> dict[str, Any]:
    """Return `{"task", "target", "score", "interval", "details"}` of a target on a task.

    Args:
        target: a run folder or one of its `checkpoints/step-*`.
        task: a row of TASKS.
        data: pictures to measure on; the run's own `data.val` when not given.
        progress: told (done, total) as the work goes on.

    Raises:
        RadioError: an unknown task or target, or no pictures to measure on.
    """
    if task not in TASKS:
        raise RadioError(f"unknown task '{task}'; known: {', '.join(sorted(TASKS))}")
    return TASKS[task](Path(target), data, progress)
