"""`radio status`: where a run stands and who waits for whom, from its folder alone."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from tiny import tiny_config
from typer.testing import CliRunner

from radio.cli import app
from radio.config import to_yaml
from radio.errors import RadioError
from radio.training.distill import distill
from radio.training.status import status

pytestmark = pytest.mark.usefixtures("no_report")


def written(root: Path, records: list[dict[str, Any]], **changes: Any) -> Path:
    """Write a run's folder as its process does, without a checkpoint."""
    config = replace(tiny_config(root, steps=10), **changes)
    out = Path(config.out)
    out.mkdir()
    (out / "config.yaml").write_text(to_yaml(config))
    (out / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return out


def record(step: int, seconds: float, waits: dict[str, float]) -> dict[str, Any]:
    return {
        "step": step,
        "losses": {"words/features": 1.0},
        "seconds": seconds,
        "images_per_second": 7 / seconds,
        "wait_share": sum(waits.values()) / seconds,
        "busy_seconds": {"words": 0.5, "parts": 0.1, "edges": 0.2},
        "waits": waits,
        "bytes": {"words": 2_000_000, "parts": 10, "edges": 10},
        "damaged": 0,
    }


def test_a_run_that_waits_says_for_whom(tmp_path: Path) -> None:
    waits = {"words": 0.8, "parts": 0.0, "edges": 0.1}
    run = written(tmp_path, [record(1, 9.0, waits), record(2, 2.0, waits), record(3, 2.0, waits)],
                  stream="ray")  # fmt: skip
    found = status(run)
    assert (found.state, found.step, found.planned, found.saved) == ("stopped", 3, 10, 0)
    assert found.seconds_per_step == 2.0 and found.eta_seconds == 14.0
    assert found.teachers[0].wait_share == pytest.approx(0.4)
    assert "waits 45% of a step, most of all for 'words'" in found.advice
    assert "give it 2 replicas (cluster.pools)" in found.advice
    assert "stream=ray" in status(written(tmp_path / "b", [record(1, 2.0, waits)])).advice
    with FileLock(run / ".lock"):
        assert status(run).state == "running"


def test_a_finished_run(tmp_path: Path) -> None:
    run = distill(tiny_config(tmp_path, steps=3)).out
    found = status(run)
    assert (found.state, found.step, found.saved, found.eta_seconds) == ("finished", 3, 3, None)
    assert [teacher.name for teacher in found.teachers] == ["words", "parts", "edges"]
    assert all(teacher.num_bytes > 0 and teacher.busy_seconds > 0 for teacher in found.teachers)
    done = CliRunner().invoke(app, ["status", str(run), "--json", "-"])
    assert json.loads(done.stdout)["step"] == 3
    shown = CliRunner().invoke(app, ["status", str(run)]).stdout
    assert "finished: step 3 of 3" in shown and "parts" in shown


def test_a_folder_that_is_no_run_s(tmp_path: Path) -> None:
    with pytest.raises(RadioError, match=r"has no config\.yaml; expected the folder that"):
        status(tmp_path)
