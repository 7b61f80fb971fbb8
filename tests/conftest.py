"""What every test shares: no network, no hub, few threads."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("MPLBACKEND", "Agg")

import pytest
import torch


@pytest.fixture(autouse=True)
def _two_threads() -> None:
    torch.set_num_threads(2)


@pytest.fixture
def no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs of the test draw no report.html, which takes as long as several of their steps.

    For files of many runs whose page nobody reads; runs of their module's fixtures have one.
    """
    monkeypatch.setattr("radio.training.student_run.write_report", lambda run, pictures: None)
