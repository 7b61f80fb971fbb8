"""Two nodes with addresses of their own: network namespaces of one machine, and a cable to pull.

Needs root, `ip` and the right to make namespaces; skipped without.
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
from test_distill import losses_of
from tiny import tiny_config

from radio.config import Config, PoolConfig, to_yaml
from radio.training.checkpoint import newest_checkpoint
from radio.training.distill import distill

BIN = Path(sys.executable).parent
HEAD, TEACHERS = "10.213.77.1", "10.213.77.2"
PORT = 6389
PROGRAM = """
import sys
import ray
from radio.config import from_yaml
from radio.training.distill import distill
from ray_jobs.cluster import cluster
from ray_jobs.feature_stream import RayStream

config = from_yaml(open(sys.argv[1]).read())
with cluster(config.cluster), RayStream(config) as stream:
    addresses = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes()}
    for name, pool in stream.pools.items():
        print(name, "lives at", addresses[ray.get(pool.replicas[0].handle.node.remote())])
    distill(config, stream)
    print("asked again", stream.retries)
"""


def can_make_namespaces() -> bool:
    if shutil.which("ip") is None or os.geteuid() != 0:
        return False
    name = f"radio-{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True).returncode == 0
    return made and subprocess.run(["ip", "netns", "del", name]).returncode == 0


pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("no_report")]


class Network:
    """Two namespaces at the ends of a cable, and a Ray node in each."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        number = os.getpid() % 10000
        self.names = {HEAD: f"rh{number}", TEACHERS: f"rt{number}"}
        self.nodes: dict[str, subprocess.Popen[bytes]] = {}
        kept = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
        token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
        self.environment = {**kept, **token, "RAY_USAGE_STATS_ENABLED": "0"}

    def __enter__(self) -> Network:
        ends = list(self.names.values())
        for name in ends:
            ip("netns", "add", name)
        ip(
            "link",
            "add",
            ends[0],
            "netns",
            ends[0],
            "type",
            "veth",
            "peer",
            ends[1],
            "netns",
            ends[1],
        )
        for address, name in self.names.items():
            ip("-n", name, "addr", "add", f"{address}/24", "dev", name)
            ip("-n", name, "link", "set", name, "up")
            ip("-n", name, "link", "set", "lo", "up")
        return self

    def inside(self, address: str, *command: str) -> list[str]:
        return ["ip", "netns", "exec", self.names[address], *command]

    def start(self, address: str, *options: str) -> None:
        """Start a node, and wait until it stays."""
        line = [
            *(str(BIN / "ray"), "start", "--block", f"--node-ip-address={address}"),
            *("--num-cpus=4", f"--object-store-memory={128 << 20}", "--disable-usage-stats"),
            f"--temp-dir={self.folder / self.names[address]}",
            *options,
        ]
        log = (self.folder / f"{self.names[address]}.log").open("ab")
        self.nodes[address] = subprocess.Popen(
            self.inside(address, *line), env=self.environment, stdout=log, stderr=log
        )

    def stop(self, address: str) -> None:
        """End every process of a namespace."""
        found = subprocess.run(
            ["ip", "netns", "pids", self.names[address]], capture_output=True, text=True
        )
        for pid in found.stdout.split():
            with suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        self.nodes.pop(address).wait()

    def plug(self, how: str) -> None:
        """Pull the teachers' cable (`down`), or put it back (`up`)."""
        name = self.names[TEACHERS]
        ip("-n", name, "link", "set", name, how)

    def run(self, config: Config) -> subprocess.Popen[str]:
        file = self.folder / "config.yaml"
        file.write_text(to_yaml(config))
        return subprocess.Popen(
            self.inside(HEAD, sys.executable, "-c", PROGRAM, str(file)),
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def __exit__(self, *raised: object) -> None:
        for address in list(self.nodes):
            self.stop(address)
        for name in self.names.values():
            ip("netns", "del", name)


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)


@pytest.fixture(scope="module")
def network() -> Iterator[Network]:
    if not can_make_namespaces():
        pytest.skip("needs root, `ip` and the right to make network namespaces")
    folder = Path("/tmp") / f"radio-netns-{os.getpid()}"  # short: it holds Unix sockets
    folder.mkdir()
    try:
        with Network(folder) as made:
            made.start(HEAD, "--head", f"--port={PORT}", "--include-dashboard=false")
            join(made)
            yield made
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def join(network: Network) -> None:
    """Start the teachers' node once the head listens."""
    line = network.inside(HEAD, "bash", "-c", f"echo > /dev/tcp/{HEAD}/{PORT}")
    deadline = time.monotonic() + 120
    while subprocess.run(line, stderr=subprocess.DEVNULL).returncode:
        assert time.monotonic() < deadline
        time.sleep(0.5)
    network.start(TEACHERS, f"--address={HEAD}:{PORT}", "--labels=role=teacher")


def far(root: Path, name: str, steps: int) -> Config:
    """Return a run whose teachers live on the other node."""
    config = tiny_config(root, steps=steps)
    config.student.size = "tiny"  # the process knows no size that a test has made up
    config.out = str(root / name)
    config.threads.student = 1
    labels = {"role": "teacher"}
    config.stream, config.cluster.address = "ray", f"{HEAD}:{PORT}"
    config.cluster.pools = {each: PoolConfig(labels=labels) for each in config.teachers}
    return config


def alone(config: Config, root: Path) -> Config:
    """Return the same run in this process."""
    cluster = replace(config.cluster, address=None)
    return replace(config, out=str(root / "local"), stream="local", cluster=cluster)


def test_teachers_at_another_address_give_the_same_bits(network: Network, tmp_path: Path) -> None:
    config = far(tmp_path, "far", steps=6)
    process = network.run(config)
    printed, _ = process.communicate(timeout=300)
    assert process.returncode == 0, printed[-4000:]
    for name in config.teachers:
        assert f"{name} lives at {TEACHERS}" in printed
    local = distill(alone(config, tmp_path)).out
    assert losses_of(config.out) == losses_of(local)


def test_a_pulled_cable_costs_no_step(network: Network, tmp_path: Path) -> None:
    config = far(tmp_path, "cut", steps=200)
    config.cluster.give_up_seconds = 300.0
    process = network.run(config)
    deadline = time.monotonic() + 240
    while newest_checkpoint(Path(config.out) / "checkpoints") is None:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    network.plug("down")
    time.sleep(5)
    assert process.poll() is None and len(losses_of(config.out)) < 200  # it waits
    network.stop(TEACHERS)
    network.plug("up")
    join(network)  # another node in its place
    printed, _ = process.communicate(timeout=400)
    assert process.returncode == 0, printed[-4000:]
    assert int(printed.split("asked again ")[1].split()[0]) >= len(config.teachers)
    local = distill(alone(config, tmp_path)).out
    assert losses_of(config.out) == losses_of(local)
