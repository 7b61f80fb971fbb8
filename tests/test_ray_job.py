"""`ray job submit` on a head node of our own: a job's losses are those of a local run."""

from __future__ import annotations

import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from test_distill import losses_of
from tiny import write_pictures

from radio.training.checkpoint import load_checkpoint

pytestmark = pytest.mark.slow

BIN = Path(sys.executable).parent
TEACHERS = ("clip", "siglip", "dinov2", "sam")
OVERRIDES = [
    "experiment=demo",
    *(f"teacher@teachers.{name}=fake" for name in TEACHERS),
    "teachers.sam.summary_weight=0",  # a canvas has no summary of one view
    "student.image_size=64",
    "stages.0.steps=3",
    "stages.0.partitions.low.image_size=32",
    "stages.0.partitions.low.batch=4",
    "stages.0.partitions.high.image_size=64",
    "stages.0.partitions.high.batch=2",
    "fit.steps=1",
    "threads.student=1",
    "data.val=null",
]


@dataclass(frozen=True)
class Head:
    """A running head node: where jobs and clients go, and the environment that holds its token."""

    address: str
    client: str
    environment: dict[str, str]

    def ray(self, *arguments: str) -> str:
        """Run `ray` against this head and return what it printed."""
        done = subprocess.run(
            [BIN / "ray", *arguments],
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stdout
        return done.stdout

    def num_teachers(self) -> int:
        """Return how many teachers ever lived in this cluster."""
        where = ["--address", self.address, "--filter", "class_name=TeacherActor"]
        return self.ray("list", "actors", *where, "--format", "json").count('"TeacherActor"')


@contextmanager
def head_node(folder: Path) -> Iterator[Head]:
    """Start a head with its own folder, ports and token, and end its processes, no other's."""
    token = folder / "token"
    token.touch(mode=0o600)
    token.write_text(secrets.token_hex(32))
    kept = {k: v for k, v in os.environ.items() if k not in ("RAY_ADDRESS", "RAY_AUTH_TOKEN")}
    environment = {**kept, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
    gcs, dashboard, client, agent = free_ports(4)
    command = [
        *(str(BIN / "ray"), "start", "--head", "--block", "--node-ip-address=127.0.0.1"),
        *(f"--port={gcs}", "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}"),
        *(f"--ray-client-server-port={client}", f"--dashboard-agent-listen-port={agent}"),
        *("--num-cpus=8", f"--object-store-memory={256 << 20}", f"--temp-dir={folder / 'ray'}"),
    ]
    with open(folder / "head.log", "w") as log:
        process = subprocess.Popen(
            command, env=environment, stdout=log, stderr=log, start_new_session=True
        )
    try:
        wait_for(dashboard, process, folder / "head.log")
        yield Head(f"http://127.0.0.1:{dashboard}", f"ray://127.0.0.1:{client}", environment)
    finally:  # `ray stop` would end every cluster of this machine
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(60)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def free_ports(count: int) -> list[int]:
    with ExitStack() as stack:  # all held at once, so that no two are the same
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [int(each.getsockname()[1]) for each in sockets]


def wait_for(port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        with suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        time.sleep(0.2)
    pytest.fail(f"the head node did not start:\n{log.read_text()}")


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    # Not tmp_path: the path of a Unix socket holds about 100 characters.
    with tempfile.TemporaryDirectory(prefix="radio-") as folder, head_node(Path(folder)) as head:
        yield head


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pictures(tmp_path_factory.mktemp("pictures"), 16)


@pytest.fixture(scope="module")
def local_run(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("local") / "run"
    subprocess.run(command(pictures, out, "stream=local"), check=True, timeout=300)
    return out


def command(pictures: Path, out: Path, *overrides: str) -> list[str]:
    where = [f"data.train={pictures}", f"out={out}"]
    return [str(BIN / "radio"), "train", *OVERRIDES, *where, *overrides]


@pytest.mark.parametrize("address", ["auto", "null"])
def test_a_submitted_job_runs_on_its_cluster_and_gives_the_same_bits(
    address: str, head: Head, pictures: Path, local_run: Path, tmp_path: Path
) -> None:
    teachers, out = head.num_teachers(), tmp_path / "run"
    entrypoint = command(pictures, out, "stream=ray", f"cluster.address={address}")
    printed = head.ray("job", "submit", f"--address={head.address}", "--", *entrypoint)
    assert "succeeded" in printed
    assert head.num_teachers() - teachers == len(TEACHERS)  # not in a cluster of the job's own
    assert_same(out, local_run)


def test_a_client_from_outside_gives_the_same_bits(
    head: Head, pictures: Path, local_run: Path, tmp_path: Path
) -> None:
    """The student lives with the client, and every target comes through Ray's client server."""
    teachers, out = head.num_teachers(), tmp_path / "run"
    line = command(pictures, out, "stream=ray", f"cluster.address={head.client}")
    done = subprocess.run(line, env=head.environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert head.num_teachers() - teachers == len(TEACHERS)
    assert_same(out, local_run)


def assert_same(out: Path, local_run: Path) -> None:
    assert len(losses_of(out)) == 3
    assert losses_of(out) == losses_of(local_run)
    ours, theirs = (
        load_checkpoint(run / "checkpoints" / "step-000003").model for run in (out, local_run)
    )
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
