from __future__ import annotations

import importlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from urllib.request import urlopen

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
from ray_jobs import placement
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


@pytest.mark.slow
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


def test_a_cluster_of_another_ray_is_refused_by_both_names(running: None) -> None:
    address = ray.get_runtime_context().gcs_address
    program = (
        "import ray\n"
        "ray.__version__ = '2.1.0'\n"
        "from radio.config import ClusterConfig\n"
        "from ray_jobs.cluster import cluster\n"
        f"with cluster(ClusterConfig(address='{address}')): pass\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    said = done.stderr.splitlines()[-1]
    assert f"cluster.address={address} runs another Ray or Python than this process" in said
    assert "Ray: 2.1.0" in said and f"Ray: {ray.__version__}" in said


def test_a_node_that_lacks_our_code_is_said_so(
    running: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The class of the teachers' actors is in a file that goes away before a worker reads it."""
    file = tmp_path / "only_here.py"
    file.write_text("from ray_jobs.actors import TeacherActor as T\nclass Only(T): pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    only_here = importlib.import_module("only_here")
    file.unlink()
    monkeypatch.setattr(placement, "TeacherActor", only_here.Only)
    with pytest.raises(RadioError, match=r"No module named 'only_here'.*install radio-distill on"):
        RayStream(tiny_config(tmp_path))


@pytest.mark.slow
def test_prometheus_is_told_who_waits_for_whom(stream: RayStream) -> None:
    [node] = ray.nodes()
    address = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    names = ("waited_seconds_total", "busy_seconds_total", "bytes_total", "in_flight")
    wanted = {f"ray_radio_{name}{{" for name in names}
    deadline = time.monotonic() + 60
    while True:  # metrics are exported every ten seconds
        with urlopen(address) as answer:
            lines = answer.read().decode().splitlines()
        found = {name for name in wanted for line in lines if line.startswith(name)}
        if found == wanted:
            break
        assert time.monotonic() < deadline, sorted(wanted - found)
        time.sleep(1)
    busy = [line for line in lines if line.startswith("ray_radio_busy_seconds_total{")]
    assert {name for name in stream.teachers if any(f'teacher="{name}"' in b for b in busy)} == set(
        stream.teachers
    )


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
