"""Student processes under Ray Train: the same losses, whatever dies and however many there are."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from test_distill import losses_of, rows_of
from tiny import tiny_config

from radio.checks import check
from radio.config import Config, ParallelConfig, to_yaml
from radio.errors import RadioError
from radio.training.checkpoint import newest_checkpoint
from radio.training.distill import distill
from radio.training.run_folder import hold
from ray_jobs.students import STARTED, train_with_workers

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("no_report")]
TESTS = Path(__file__).parent
PROGRAM = """
import sys
from radio.config import from_yaml
from ray_jobs.train import train
train(from_yaml(open(sys.argv[1]).read()))
"""


def shared(root: Path, name: str, steps: int = 12, workers: int | None = 2) -> Config:
    """Return a run whose batches are cut into micro-shards, so that several may share them."""
    config = tiny_config(root, steps=steps)
    config.out = str(root / name)
    config.student.size = "tiny"  # workers know no size that a test has made up
    for partition in config.stages[0].partitions.values():
        partition.batch = 4
    config.parallel = ParallelConfig(micro_shard=2)
    config.threads.student = 1
    if workers is not None:
        config.parallel = replace(config.parallel, kind="ddp", workers=workers)
        config.stream = "ray"
    config.cluster.object_store_mb = 256
    check(config)
    return config


def started(config: Config, root: Path) -> subprocess.Popen[str]:
    """Start a run in a process of its own, which Ray Train's takes half a minute."""
    file = root / f"{Path(config.out).name}-{time.monotonic_ns()}.yaml"
    file.write_text(to_yaml(config))
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(file)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=root,
    )


def finished(config: Config, root: Path) -> str:
    process = started(config, root)
    printed, _ = process.communicate(timeout=400)
    assert process.returncode == 0, printed[-4000:]
    return printed


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("students")
    return root, distill(shared(root, "alone", workers=None)).out


def assert_close(ours: Path, theirs: Path, rel: float = 1e-5, steps: int | None = None) -> None:
    """Other processes sum gradients in another order: losses agree to `rel` of their size."""
    a, b = losses_of(ours), losses_of(theirs)
    assert len(a) == len(b)
    for mine, other in zip(a[:steps], b[:steps], strict=True):
        assert mine == pytest.approx(other, rel=rel)
    assert [row["step"] for row in rows_of(ours)] == [row["step"] for row in rows_of(theirs)]


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_workers_have_the_losses_of_one_process(kind: str, alone: tuple[Path, Path]) -> None:
    root, expected = alone
    config = shared(root, kind)
    config.parallel.kind = kind
    finished(config, root)
    assert_close(Path(config.out), expected)


def student_pids() -> list[int]:
    """Return the processes that train; no other test of this machine starts such."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            if b"RayTrainWorker" in path.read_bytes():
                found.append(int(path.parent.name))
    return sorted(found)


def wait_for(what: Any, seconds: float = 240) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_killed_worker_costs_no_step(alone: tuple[Path, Path]) -> None:
    root, expected = alone
    config = shared(root, "killed")
    config.checkpoint.every_steps = 1
    process = started(config, root)
    wait_for(lambda: newest_checkpoint(Path(config.out) / "checkpoints") is not None)
    os.kill(student_pids()[-1], signal.SIGKILL)
    assert len(losses_of(config.out)) < 12  # it was not over yet
    printed, _ = process.communicate(timeout=400)
    assert process.returncode == 0, printed[-4000:]
    assert len(list((Path(config.out) / "ray_train").glob("start-*"))) == 2
    assert_close(Path(config.out), expected)


def kept(config: Config) -> Config:
    """Return the run with a cache, whose file names are hashes over what a micro-shard sees."""
    config.data.repeat_epochs = 4  # 12 steps of 8 views: all that there are of 24 pictures
    config.cache = f"{config.out}-cache"
    return config


def names_in(folder: str | None) -> set[str]:
    return {path.name for path in Path(str(folder)).rglob("*") if path.is_file()}


def test_one_worker_then_two_then_one_see_the_same_samples(tmp_path: Path) -> None:
    alone = kept(shared(tmp_path, "alone", workers=None))
    distill(alone)
    for workers, steps in ((1, 4), (2, 8), (1, 12)):
        config = kept(shared(tmp_path, "elastic", workers=workers))
        config.checkpoint.every_steps = 4
        if steps < 12:
            process = started(config, tmp_path)
            folder = Path(config.out) / "checkpoints" / f"step-{steps:06d}"
            wait_for(folder.exists)
            (Path(config.out) / ".stop").touch()
            process.communicate(timeout=400)
        else:
            finished(config, tmp_path)
    assert names_in(config.cache) == names_in(alone.cache)
    assert_close(Path(config.out), Path(alone.out))


def test_a_run_begins_with_the_workers_that_have_a_place(alone: tuple[Path, Path]) -> None:
    root, expected = alone
    config = shared(root, "fewer")
    config.parallel.min_workers = 1
    config.cluster.cpus = len(config.teachers) + 1
    finished(config, root)
    assert_close(Path(config.out), expected)


def test_workers_without_a_place_say_what_is_free(tmp_path: Path) -> None:
    config = shared(tmp_path, "nowhere", workers=9)
    config.cluster.give_up_seconds = 1.0
    process = started(config, tmp_path)
    printed, _ = process.communicate(timeout=400)
    assert process.returncode != 0
    assert "9 of the student's processes (1 CPU each) have no place beside the teachers" in printed
    assert "8 of 8 CPU free; lower parallel.workers" in printed


def test_ctrl_c_ends_between_two_steps_and_the_same_command_goes_on(
    alone: tuple[Path, Path],
) -> None:
    root, expected = alone
    config = shared(root, "interrupted")
    process = started(config, root)
    wait_for(lambda: newest_checkpoint(Path(config.out) / "checkpoints") is not None)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=400)
    assert process.returncode != 0
    assert not (Path(config.out) / ".stop").exists()
    newest = newest_checkpoint(Path(config.out) / "checkpoints")
    assert newest is not None and int(newest.name[-6:]) == len(losses_of(config.out)) < 12
    finished(config, root)
    assert_close(Path(config.out), expected)


def test_a_second_start_is_refused_and_the_first_goes_on(alone: tuple[Path, Path]) -> None:
    root, _ = alone
    config = shared(root, "held")
    with (
        hold(Path(config.out), STARTED),
        pytest.raises(RadioError, match="another process is writing to"),
    ):
        train_with_workers(config)
    assert not (Path(config.out) / ".stop").exists()


def test_a_mistake_is_said_once_and_not_tried_again(alone: tuple[Path, Path]) -> None:
    root, _ = alone
    config = shared(root, "mistake")
    config.teachers["words"] = replace(config.teachers["words"], kind="fakee")
    process = started(config, root)
    printed, _ = process.communicate(timeout=400)
    assert process.returncode != 0
    assert "RadioError: teachers.words (fakee)" in printed


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": None}, r"workers=2 are processes of Ray Train: set stream=ray and.*kind=ddp"),
        ({"min_workers": 3}, r"workers is 2 and parallel\.min_workers 3"),
    ],
)
def test_what_does_not_go_together_is_refused(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    config = shared(tmp_path, "run")
    config.parallel = replace(config.parallel, **change)
    with pytest.raises(RadioError, match=message):
        check(config)
