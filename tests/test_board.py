"""`tensorboard: true`: TensorBoard reads the numbers of metrics.jsonl, also of a resumed run."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_distill import DyingStream, Killed
from tiny import tiny_config

from radio.errors import RadioError
from radio.training.distill import distill
from radio.training.run_folder import RunFolder

pytestmark = pytest.mark.usefixtures("no_report")


def test_tensorboard_shows_what_metrics_jsonl_says(tmp_path: Path) -> None:
    config = replace(tiny_config(tmp_path, steps=6), tensorboard=True)
    with DyingStream(config, 3) as stream, pytest.raises(Killed):
        distill(config, stream)
    distill(config)
    events = EventAccumulator(str(Path(config.out) / "tensorboard"))
    events.Reload()
    records = RunFolder(Path(config.out)).records()
    losses = {r["step"]: r["losses"]["words/features"] for r in records if "losses" in r}
    shown = {event.step: event.value for event in events.Scalars("losses/words/features")}
    assert shown == pytest.approx(losses)
    assert {"fidelity/words@32", "waits/parts", "seconds"} <= set(events.Tags()["scalars"])
    assert "fidelity/words@64/merged" in events.Tags()["scalars"]


def test_without_the_package_the_way_out_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(RadioError, match=r"pip install tensorboard; or set tensorboard=false"):
        distill(replace(tiny_config(tmp_path), tensorboard=True))
