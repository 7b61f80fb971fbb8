from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import ray
from test_distill import losses_of, rows_of
from test_students import three_students
from tiny import tiny_config

from radio.config import ClusterConfig, Config
from radio.data.plan import StepSpec
from radio.errors import RadioError
from radio.targets.stream import StepBatch
from radio.targets.target_maker import Request
from radio.training.distill import distill, students_of
from ray_jobs.cluster import cluster
from ray_jobs.feature_stream import RayStream

pytestmark = pytest.mark.usefixtures("no_report")


@pytest.fixture(scope="module")
def running() -> Iterator[None]:
    with cluster(ClusterConfig(cpus=9, object_store_mb=256)):  # three actors and twice as many
        yield


@pytest.fixture(scope="module")
def local_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return distill(tiny_config(tmp_path_factory.mktemp("local"), steps=10)).out


class Murderer(RayStream):
    """Kills one replica of a teacher in mid-run, in the way the operating system would."""

    def __init__(self, config: Config, at: int, victim: str) -> None:
        super().__init__(config)
        self.at, self.victim = at, victim

    def read(
        self, specs: Iterable[StepSpec], request: Request, incarnation: int = 0
    ) -> Iterator[StepBatch]:
        for batch in super().read(specs, request, incarnation):
            yield batch
            if request.codec != "float32" and batch.step == self.at:
                pid = ray.get(self.pools[self.victim].replicas[0].handle.pid.remote())
                os.kill(pid, signal.SIGKILL)


class Interrupted(RayStream):
    """Ctrl-C before the third step, once."""

    interrupts = 1

    def read(
        self, specs: Iterable[StepSpec], request: Request, incarnation: int = 0
    ) -> Iterator[StepBatch]:
        for batch in super().read(specs, request, incarnation):
            if request.codec != "float32" and batch.step == 2 and self.interrupts:
                self.interrupts -= 1
                raise KeyboardInterrupt
            yield batch


@pytest.fixture(scope="module")
def stream(running: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayStream]:
    """Teachers in actors that have served a whole run; each actor is a start of Python."""
    config = tiny_config(tmp_path_factory.mktemp("ray"), steps=10)
    with RayStream(config) as stream:
        distill(config, stream)
        yield stream


def test_ray_and_local_give_the_same_bits(stream: RayStream, local_run: Path) -> None:
    assert stream.retries == 0
    assert losses_of(stream.config.out) == losses_of(local_run)
    assert rows_of(stream.config.out) == rows_of(local_run)


def test_a_refit_and_students_at_other_starts_have_the_same_bits_on_ray(
    running: None, tmp_path: Path
) -> None:
    """A fit in mid-run, and a student that begins anew, are of the run's own incarnation."""
    local = three_students(tmp_path / "local")
    distill(local)
    config = three_students(tmp_path / "ray")
    with Interrupted(config) as stream:
        with pytest.raises(KeyboardInterrupt):
            distill(config, stream)
        shutil.rmtree(Path(config.out) / "students" / "shallow")
        distill(config, stream)  # the same actors, which refuse an older incarnation
    for name, run in students_of(config).items():
        assert losses_of(run.out) == losses_of(students_of(local)[name].out)


def test_a_killed_teacher_changes_no_bit(running: None, local_run: Path, tmp_path: Path) -> None:
    config = tiny_config(tmp_path, steps=10)
    with Murderer(config, 4, "parts") as stream:
        distill(config, stream)
        assert stream.retries >= 1
    assert losses_of(config.out) == losses_of(local_run)


@pytest.mark.slow
def test_two_replicas_change_no_bit(running: None, local_run: Path, tmp_path: Path) -> None:
    config = tiny_config(tmp_path, steps=10)
    config.cluster.replicas = 2
    with RayStream(config) as stream:
        distill(config, stream)
    assert losses_of(config.out) == losses_of(local_run)


def test_a_mistake_in_a_teacher_arrives_as_itself(running: None, tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    config.teachers = {"parts": replace(config.teachers["parts"], kind="fakee")}
    for partition in config.stages[0].partitions.values():
        partition.views = {"parts": "match"}
    with pytest.raises(RadioError, match=r"teachers\.parts.*fakee"):
        RayStream(config)


def test_an_older_students_call_is_refused(stream: RayStream) -> None:
    replica = stream.pools["words"].replicas[0].handle
    request, sources = Request("train", "bf16", {}), stream._workers.sources
    assert ray.get(replica.encode.remote(sources, (), request, 2)) == {}
    with pytest.raises(Exception, match=r"incarnation 2.*incarnation 1 came late"):
        ray.get(replica.encode.remote(sources, (), request, 1))


def test_a_wrong_address_is_explained() -> None:
    program = (
        "from radio.config import ClusterConfig\n"
        "from ray_jobs.cluster import cluster\n"
        "with cluster(ClusterConfig(address='127.0.0.1:1')): pass\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert "RadioError" in done.stderr and "cluster.address=127.0.0.1:1" in done.stderr
    assert "ray start --head" in done.stderr


def test_a_wrong_ray_address_is_named_as_such(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    with pytest.raises(RadioError, match="RAY_ADDRESS=127"), cluster(ClusterConfig()):
        raise AssertionError("nothing is there to join")


@pytest.mark.slow
def test_one_process_makes_one_local_cluster_after_another() -> None:
    program = (
        "import ray\n"
        "from radio.config import ClusterConfig\n"
        "from ray_jobs.cluster import cluster\n"
        "for number in range(2):\n"
        "    with cluster(ClusterConfig(object_store_mb=128)):\n"
        "        print(ray.get(ray.remote(lambda: number).remote()))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout == "0\n1\n", done.stderr
    assert done.stderr == ""
