"""The demo with its real libraries: same bits everywhere, and everything that it promises."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import ray
from test_distill import losses_of, rows_of
from test_ray import Murderer

from radio.data.photographs import write_photographs
from radio.training.distill import distill
from ray_jobs.cluster import cluster
from ray_jobs.demo import demo_config
from ray_jobs.feature_stream import RayStream

pytestmark = pytest.mark.slow
SHORT = ["stages.0.steps=10", "evaluation.views=8", "evaluation.every_steps=0"]
SHORT += ["checkpoint.every_steps=3", "fit.steps=2"]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    paths = write_photographs(tmp_path_factory.mktemp("photographs"))
    return [f"data.{split}={path}" for split, path in paths.items()]


@pytest.fixture(scope="module")
def local(pictures: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten steps with the four teachers in this process."""
    out = tmp_path_factory.mktemp("local") / "run"
    return distill(demo_config([*SHORT, *pictures, "stream=local", f"out={out}"])).out


def test_four_real_teachers_in_actors_give_the_same_bits(
    pictures: list[str], local: Path, tmp_path: Path
) -> None:
    config = demo_config([*SHORT, *pictures, f"out={tmp_path / 'run'}"])
    with cluster(config.cluster), RayStream(config) as stream:
        distill(config, stream)
    assert len(losses_of(local)) == 10
    assert losses_of(config.out) == losses_of(local)
    assert rows_of(config.out) == rows_of(local)


def test_a_killed_sam_changes_no_bit(pictures: list[str], local: Path, tmp_path: Path) -> None:
    config = demo_config([*SHORT, *pictures, f"out={tmp_path / 'run'}"])
    with cluster(config.cluster), Murderer(config, at=4, victim="sam") as stream:
        distill(config, stream)
        assert stream.retries > 0
    assert losses_of(config.out) == losses_of(local)


def test_a_killed_driver_resumes_with_the_same_bits(
    pictures: list[str], local: Path, tmp_path: Path
) -> None:
    words = ["train", "experiment=demo", *SHORT, *pictures, f"out={tmp_path / 'run'}"]
    command = [sys.executable, "-c", "from radio.cli import main; main()", *words]
    first = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    metrics = tmp_path / "run" / "metrics.jsonl"
    while first.poll() is None and not (metrics.exists() and '"step": 5,' in metrics.read_text()):
        time.sleep(0.1)
    os.kill(first.pid, signal.SIGKILL)
    assert first.wait() == -signal.SIGKILL
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "resuming" in done.stderr and "at step 3" in done.stderr
    assert losses_of(tmp_path / "run") == losses_of(local)


def test_the_demo_leaves_what_it_promises(tmp_path: Path) -> None:
    words = ["demo", *SHORT, f"out={tmp_path / 'demo'}"]
    command = [sys.executable, "-c", "from radio.cli import main; main()", *words]
    for _ in range(2):  # the second finds the run finished, and makes the rest again
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert "held-out photographs" in done.stdout and "256 merged" in done.stdout
    assert "nothing to train" in done.stderr
    out = tmp_path / "demo"
    names = {"report.html", "metrics.jsonl", "config.yaml", "checkpoints", "encoder", "features"}
    assert names <= {path.name for path in out.iterdir()}
    table = pq.read_table(out / "features" / "data" / "00000.parquet")
    assert table.num_rows == 64
    assert {"summary", "clip:summary", "siglip:summary", "dinov2:summary"} <= set(
        table.column_names
    )
    assert not ray.is_initialized()
