"""Task fidelity: scikit-learn's R^2 said otherwise, with an interval from its single views."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import r2_score
from tiny import tiny_config

import radio.evaluation.fidelity as module
from radio.errors import RadioError
from radio.evaluation.evaluate import evaluate
from radio.evaluation.fidelity import lowest
from radio.evaluation.result import Options
from radio.training.distill import distill
from radio.training.metrics import Fidelity

pytestmark = pytest.mark.usefixtures("no_report")


def drawn(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return predictions and targets [n, 5, 3, 4] with channels of their own, and which count."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.randn(count, 5, 3, 4, generator=generator) * torch.arange(1, 6).view(5, 1, 1) + 7
    p = y + torch.randn(y.shape, generator=generator)
    return p, y, torch.rand(count, 3, 4, generator=generator) < 0.7


def judged(p: torch.Tensor, y: torch.Tensor, valid: torch.Tensor) -> float:
    """Return 1 / (1 - R^2) of [n, d, h, w] at valid positions, channels weighted by variance."""
    known, said = (values.movedim(1, -1)[valid].double().numpy() for values in (y, p))
    return float(1 / (1 - r2_score(known, said, multioutput="variance_weighted")))


def test_fidelity_is_scikit_learn_s_r2() -> None:
    found = Fidelity()
    batches = [drawn(count, seed) for seed, count in enumerate((4, 4, 3))]
    for p, y, valid in batches:
        found.update(p, y.masked_fill(~valid[:, None], torch.nan), valid)
    expected = judged(*(torch.cat(parts) for parts in zip(*batches, strict=True)))
    assert found.value == pytest.approx(expected, rel=1e-9)
    values = found.by_view().numpy()
    assert values.shape == (11, 2) and lowest(values[:, None]) == pytest.approx(expected, rel=1e-9)


def test_the_score_of_a_run_and_its_interval(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(tmp_path, steps=1)
    config.student.merge_per_block = 2
    run = distill(config).out
    seen: dict[int, list[Any]] = {}
    values: list[np.ndarray] = []
    update, interval = Fidelity.update, module.bootstrap

    def watched(self: Fidelity, *given: Any) -> None:
        seen.setdefault(id(self), []).append((self, *given))
        update(self, *given)

    def kept(rows: np.ndarray, *given: Any, **more: Any) -> Any:
        values.append(rows)
        return interval(rows, *given, **more)

    monkeypatch.setattr(Fidelity, "update", watched)
    monkeypatch.setattr(module, "bootstrap", kept)
    found = evaluate(run)
    every = found["details"]["rows"]
    rows = [row for row in every if not row["merged"]]
    assert len(rows) < len(every)
    judges = [
        judged(*(torch.cat(parts) for parts in list(zip(*several, strict=True))[1:]))
        for several in seen.values()
    ]
    assert [row["fidelity"] for row in every] == pytest.approx(judges, rel=1e-5)
    assert found["score"] == min(row["fidelity"] for row in rows)
    assert values[0].shape[1:] == (len(rows), 2)
    for at, row in enumerate(rows):
        spread, residual = values[0][:, at].sum(axis=0)
        assert spread / residual == pytest.approx(row["fidelity"], rel=1e-6)
    low, high = found["interval"]
    assert low < found["score"] < high
    assert evaluate(run)["interval"] == [low, high]
    assert evaluate(run, options=Options(seed=1))["interval"] != [low, high]
    with pytest.raises(RadioError, match=r"'pocket' is neither a run .*--task.*knn, linear, zero"):
        evaluate("pocket")
