"""Task `fidelity`: how much of each teacher's features a run's student explains."""

from __future__ import annotations

import math
import statistics
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from radio.config import Config
from radio.data.configured import training_plan
from radio.data.plan import StepSpec
from radio.errors import RadioError
from radio.evaluation.result import bootstrap
from radio.progress import Report, told
from radio.targets.standardize import save_standardizers
from radio.targets.stream import LocalStream, device_of
from radio.targets.target_maker import Request, StandardizerFile
from radio.training.checkpoint import Checkpoint, find_checkpoint
from radio.training.learner import student_for
from radio.training.metrics import Row, held_out, table
from radio.training.student_run import HELD_OUT_BATCH


def lowest(values: NDArray[Any]) -> float:
    """Return the lowest fidelity over rows from [views, rows, 2] sums."""
    spread, residual = np.moveaxis(values.sum(axis=0), -1, 0)
    return float((spread / residual).min())


def _interval(by_view: list[Float[Tensor, "views 2"]], seed: int) -> list[float]:
    return list(bootstrap(torch.stack(by_view, dim=1).numpy(), lowest, seed=seed))


def fidelity(
    target: Path, data: str | None, progress: Report | None = None, seed: int = 0
) -> dict[str, Any]:
    """Return the worst fidelity over teachers and resolutions, with every row in the details.

    Targets are float32; crops are the run's own seeded held-out crops. The interval weighs views,
    the mean staying that of all; there is none for a student without any error.
    """
    checkpoint = find_checkpoint(target)
    config = _with_data(checkpoint.config, data)
    with tempfile.TemporaryDirectory() as folder, LocalStream(config) as stream:
        _same_teachers(stream, checkpoint)
        student = student_for(config, stream.teachers, init=False)
        student.load_state_dict(checkpoint.model)
        path = Path(folder) / "standardizers.safetensors"
        save_standardizers(path, checkpoint.standardizers, {})
        files = dict.fromkeys(checkpoint.standardizers, StandardizerFile.of(path))
        plan = training_plan(config, len(stream.sources["train"]))
        num_views = min(config.evaluation.views, len(stream.sources["val"]))
        partitions = plan.held_out(num_views, HELD_OUT_BATCH, checkpoint.standardizers)
        specs = [StepSpec(at, 0, 0, (part,)) for at, part in enumerate(partitions)]
        request = Request("val", "float32", files)
        batches = told(stream.read(specs, request), len(specs), progress)
        device = device_of(config)
        scores = held_out(student.to(device), batches, device)
    rows = table(scores)
    plain = [row.fidelity for row in rows if not row.merged]
    finite = all(map(math.isfinite, plain))
    by_view = [each.features.by_view() for (*_, merged), each in scores.items() if not merged]
    return {
        "task": "fidelity",
        "target": str(target),
        "score": min(plain),
        "interval": _interval(by_view, seed) if finite else None,
        "details": {
            "step": checkpoint.step,
            "median": statistics.median(plain),
            "rows": [row.as_dict() for row in rows],
        },
    }


def rows_of(result: dict[str, Any]) -> list[Row]:
    """Return a fidelity result's rows."""
    return [Row(**row) for row in result["details"]["rows"]]


def _with_data(config: Config, data: str | None) -> Config:
    val = data if data is not None else config.data.val
    if val is None:
        raise RadioError("the run has no data.val: say which pictures with --data")
    return replace(config, data=replace(config.data, val=val))


def _same_teachers(stream: LocalStream, checkpoint: Checkpoint) -> None:
    for name, facts in stream.teachers.items():
        if checkpoint.state["teachers"][name]["fingerprint"] != facts.fingerprint:
            raise RadioError(
                f"teacher '{name}' has other weights than when {checkpoint.path} was trained; "
                "its fidelity would mean nothing"
            )
