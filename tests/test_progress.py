"""Progress where no terminal is: lines with the time that is left."""

from __future__ import annotations

import logging

import pytest

from radio import progress
from radio.progress import ProgressDisplay


def test_a_run_that_goes_back_to_a_checkpoint_is_shown(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.0)
    with caplog.at_level(logging.INFO), ProgressDisplay() as display:
        display.phase("training", 10)
        for done in (7, 5, 6):
            display.update(done, 10, "loss 1")
    shown = [record.getMessage() for record in caplog.records]
    assert [line.split("  ")[0] for line in shown] == ["training", "7/10", "5/10", "6/10"]
    assert all("ETA" in line for line in shown[1:])
