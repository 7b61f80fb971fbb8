"""The quick pocket run while everything that it consists of is killed: not one bit of difference.

    python -m benchmarks.chaos [--data sets] [--faults 32] [--seed 0] [--only KIND]

A cluster of a head and two nodes for teachers, on this machine: two replicas of each of the four
pocket teachers, two feeders, the student's two processes under Ray Train. One run is left alone,
the other is disturbed at seeded moments (see KINDS). Then every step must be there once, with the
same losses to the last bit, and so must the student's weights and its optimizer's state. The counts
of lost and doubled batches are of metrics.jsonl, which a resume cuts back: they say that the record
is whole. That training saw every batch once is what equal losses and weights say.

A fault's stall is by how much the run is later, at the next fault, than the undisturbed one was at
the same step: what was lost, and what new processes take from the two cores while they load.
`--only teacher --workers 0` kills replicas alone, and says how long the student stood still for
its teachers between a fault and the next, over what it did in the undisturbed run.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import random
import secrets
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("RAY_AUTH_MODE", "token")  # before Ray is imported, here and in every run
os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import numpy as np
import ray
from ray.cluster_utils import Cluster

from benchmarks.findings.material import put_together
from benchmarks.record import write
from benchmarks.runs import Run, command, processes, quick

STORE_MB = 512  # of each node
NODES = 2  # for teachers
LABELS = {"role": "teacher"}
TEACHERS = ("clip", "siglip", "dinov2", "sam")
POOL = "{replicas: 2, cpus: 1, labels: {role: teacher}}"
LOOK_SECONDS = 0.05
FULL_SECONDS = 10.0  # that the store is kept full
CALM = 6  # steps at the end without a new fault, so that the last one's stall is seen
PATIENCE_SECONDS = 600.0  # without a new step


def config_of(pictures: Path, address: str, workers: int) -> list[str]:
    """Return the run's overrides."""
    parallel = f"parallel={{kind: ddp, workers: {workers}, micro_shard: 4}}"
    return quick(
        pictures,
        "stream=ray",
        f"cluster.address={address}",
        "cluster.feeders=2",
        f"+cluster.pools={{{', '.join(f'{name}: {POOL}' for name in TEACHERS)}}}",
        "cluster.call_timeout_seconds=20",
        "checkpoint.every_steps=5",
        *([parallel] if workers else []),
    )


class Nodes:
    """The cluster, whose nodes can be lost and come back."""

    def __init__(self) -> None:
        head = {"num_cpus": 8, "object_store_memory": STORE_MB << 20, "include_dashboard": False}
        self.cluster = Cluster(initialize_head=True, head_node_args=head)
        self.workers = [self.add() for _ in range(NODES)]
        ray.init(address=self.cluster.address, log_to_driver=False, logging_level="ERROR")

    def add(self) -> Any:
        return self.cluster.add_node(
            num_cpus=len(TEACHERS), object_store_memory=STORE_MB << 20, labels=LABELS
        )

    def lose(self, number: int) -> None:
        self.cluster.remove_node(self.workers[number], allow_graceful=False)
        self.workers[number] = self.add()

    def close(self) -> None:
        ray.shutdown()
        self.cluster.shutdown()


@dataclass
class Training:
    """A run that is under way, started again when its driver was killed."""

    overrides: list[str]
    out: Path
    process: subprocess.Popen[bytes] | None = None
    reached: dict[int, float] = field(default_factory=dict)  # when each step was first done
    starts: int = 0

    def start(self) -> None:
        with (self.out.parent / f"{self.out.name}.log").open("ab") as log:
            line = command([*self.overrides, f"out={self.out}"])
            self.process = subprocess.Popen(line, stdout=log, stderr=log, start_new_session=True)
        self.starts += 1

    def look(self) -> int:
        """Return the last step that is done, noting when it was first seen."""
        step = 0
        with suppress(FileNotFoundError):
            for line in (self.out / "metrics.jsonl").read_text().splitlines():
                with suppress(json.JSONDecodeError):  # being written
                    record = json.loads(line)
                    if "losses" in record:
                        step = int(record["step"])
                        self.reached.setdefault(step, time.monotonic())
        return step

    @property
    def over(self) -> bool:
        assert self.process is not None
        code = self.process.poll()
        if code:
            log = (self.out.parent / f"{self.out.name}.log").read_text()
            raise SystemExit(f"the run ended with {code}:\n{log[-3000:]}")
        return code == 0


@dataclass
class Fault:
    """What is done after a step, how long it takes a run to get over it, and to whom."""

    kind: str
    step: int  # after which it is to be done; then, after which it was
    delay: float
    whom: str = ""
    at: float = 0.0
    stall: float = 0.0
    stood_still: float = 0.0


class Disturber:
    """Knows the processes of a run by the titles that Ray gives them."""

    def __init__(self, nodes: Nodes, training: Training, seed: int) -> None:
        self.nodes, self.training, self.random = nodes, training, random.Random(seed)

    def do(self, fault: Fault) -> None:
        fault.at = time.monotonic()
        fault.whom = KINDS[fault.kind](self)

    def teacher(self) -> str:
        return self._signal(signal.SIGKILL, "ray::TeacherActor.encode")

    def hang(self) -> str:
        return self._signal(signal.SIGSTOP, "ray::TeacherActor.encode")

    def feeder(self) -> str:
        return self._signal(signal.SIGKILL, "ray::Feeder.feed", "ray::Feeder")

    def worker(self) -> str:
        return self._signal(signal.SIGKILL, "ray::RayTrainWorker")

    def node(self) -> str:
        number = self.random.randrange(NODES)
        self.nodes.lose(number)
        return f"node {number}"

    def driver(self) -> str:
        process = self.training.process
        assert process is not None
        process.kill()
        process.wait()
        self.training.start()
        return f"pid {process.pid}"

    def store(self) -> str:
        """Hold more than the student's node can, for a while."""
        piece = np.ones(16 << 20, np.uint8)
        held = [ray.put(piece) for _ in range(3 * STORE_MB // 32)]
        time.sleep(FULL_SECONDS)
        return f"{len(held) * piece.nbytes / 1e6:.0f} MB"

    def _signal(self, how: signal.Signals, *titles: str) -> str:
        """Send a signal to a process of the first title that is found; wait until there is one."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while time.monotonic() < deadline:
            for title in titles:
                if found := processes(title):
                    pid = self.random.choice(found)
                    with suppress(ProcessLookupError):
                        os.kill(pid, how)
                        return f"{title} {pid}"
            time.sleep(LOOK_SECONDS)
        raise SystemExit(f"no process {titles} to be disturbed")


KINDS: dict[str, Callable[[Disturber], str]] = {
    "teacher": Disturber.teacher,  # a replica is killed in the middle of a pass
    "hang": Disturber.hang,  # a replica stops in the middle of a pass, and never goes on
    "feeder": Disturber.feeder,
    "worker": Disturber.worker,  # one of the student's processes
    "node": Disturber.node,  # with its four replicas and what its store holds
    "driver": Disturber.driver,
    "store": Disturber.store,  # is filled by another user of the cluster
}
WEIGHTS = {"teacher": 8, "hang": 4, "feeder": 5, "worker": 4, "node": 4, "driver": 3, "store": 4}


def drawn(kinds: list[str], count: int, steps: int, usual: float, seed: int) -> list[Fault]:
    """Return faults at seeded moments, each kind as often as its weight says."""
    generator = random.Random(f"faults {seed}")
    shares = [kind for kind in kinds for _ in range(WEIGHTS[kind])]
    generator.shuffle(shares)
    chosen = [shares[number % len(shares)] for number in range(count)]
    generator.shuffle(chosen)
    moments = sorted(generator.randrange(1, steps - CALM) for _ in range(count))
    return [
        Fault(kind, step, generator.uniform(0, usual))
        for kind, step in zip(chosen, moments, strict=True)
    ]


def follow(training: Training, faults: list[Fault], disturber: Disturber | None) -> Run:
    """Run to the end, doing each fault when its step is done, one step after the last at least."""
    started = time.monotonic()
    training.start()
    left, last, moved = collections.deque(faults), 0, started
    while not training.over:
        step = training.look()
        if len(training.reached) > last:
            last, moved = len(training.reached), time.monotonic()
            if left and step >= left[0].step:
                assert disturber is not None
                fault = left.popleft()
                time.sleep(fault.delay)
                disturber.do(fault)
                fault.step = step
                print(f"step {step}: {fault.kind} ({fault.whom})", file=sys.stderr, flush=True)
        if time.monotonic() - moved > PATIENCE_SECONDS:
            raise SystemExit(f"no new step for {PATIENCE_SECONDS:.0f} s")
        time.sleep(LOOK_SECONDS)
    training.look()
    if left:
        raise SystemExit(f"{len(left)} faults were not done: the run was over before")
    return Run(training.out, time.monotonic() - started, 0.0)


def stalls(faults: list[Fault], ours: dict[int, float], alone: dict[int, float]) -> None:
    """Note with each fault how much later the run is by the next one than it was at the fault."""

    def late(moment: float) -> float:
        """Return the seconds behind the undisturbed run at the last step done before."""
        step = max((step for step, when in ours.items() if when <= moment), default=min(ours))
        return (ours[step] - ours[1]) - (alone[step] - alone[1])

    ends = [fault.at for fault in faults[1:]] + [max(ours.values())]
    for fault, end in zip(faults, ends, strict=True):
        fault.stall = late(end) - late(fault.at)


def stood_still(faults: list[Fault], ours: Run, alone: Run) -> None:
    """Note with each fault how much longer the student waited for teachers, up to the next one."""
    waits = [sum(record["waits"].values()) for record in ours.records]
    usual = [sum(record["waits"].values()) for record in alone.records]
    ends = [fault.step for fault in faults[1:]] + [len(waits)]
    for fault, end in zip(faults, ends, strict=True):
        fault.stood_still = sum(waits[fault.step : end]) - sum(usual[fault.step : end])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--data", type=Path, default=Path("sets"))
    parser.add_argument("--work", type=Path, default=Path("runs/chaos"))
    parser.add_argument("--faults", type=int, default=32)
    parser.add_argument("--steps", type=int, default=110)
    parser.add_argument("--workers", type=int, default=2, help="of the student; 0: the driver")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=KINDS)
    options = parser.parse_args()
    name = f"chaos_{options.only}" if options.only else "chaos"
    work = options.work / name
    pictures = put_together(options.data, options.work / "material").pictures.folder.resolve()
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    nodes = Nodes()
    try:
        shared = config_of(pictures, nodes.cluster.address, options.workers)
        shared.append(f"stages.0.steps={options.steps}")
        quiet = Training(shared, work / "undisturbed")
        undisturbed = follow(quiet, [], None)
        usual = statistics.median(undisturbed.seconds)
        kinds = [options.only] if options.only else list(KINDS)
        faults = drawn(kinds, options.faults, options.steps, usual, options.seed)
        training = Training(shared, work / "disturbed")
        disturbed = follow(training, faults, Disturber(nodes, training, options.seed))
    finally:
        nodes.close()
    stalls(faults, training.reached, quiet.reached)
    stood_still(faults, disturbed, undisturbed)
    write(name, report(undisturbed, disturbed, faults, training, options.steps))


def report(
    undisturbed: Run, disturbed: Run, faults: list[Fault], training: Training, steps: int
) -> dict[str, Any]:
    """Return what became of the disturbed run."""
    done = collections.Counter(int(record["step"]) for record in disturbed.records)
    passes = [max(record["busy_seconds"].values()) for record in undisturbed.records]
    by_kind: dict[str, list[float]] = {}
    still: dict[str, list[float]] = {}
    for fault in faults:
        by_kind.setdefault(fault.kind, []).append(fault.stall)
        still.setdefault(fault.kind, []).append(fault.stood_still)
    return {
        "what": "the quick pocket run with faults at seeded moments, against itself undisturbed",
        "steps": steps,
        "faults": len(faults),
        "batches_lost": sum(step not in done for step in range(1, steps + 1)),
        "batches_twice": sum(count - 1 for count in done.values()),
        "losses_bit_equal": disturbed.losses == undisturbed.losses,
        "weights_bit_equal": disturbed.weights == undisturbed.weights,
        "driver_starts": training.starts,
        "undisturbed_seconds": undisturbed.wall_seconds,
        "disturbed_seconds": disturbed.wall_seconds,
        "step_seconds": statistics.median(undisturbed.seconds),
        "longest_pass_seconds": statistics.median(passes),
        "stall_seconds": {
            kind: {
                "faults": len(found),
                "median": statistics.median(found),
                "most": max(found),
                "stood_still_median": statistics.median(still[kind]),
                "stood_still_most": max(still[kind]),
            }
            for kind, found in sorted(by_kind.items())
        },
        "each": [
            {
                "kind": fault.kind,
                "step": fault.step,
                "whom": fault.whom,
                "stall_seconds": fault.stall,
                "stood_still_seconds": fault.stood_still,
            }
            for fault in faults
        ],
    }


if __name__ == "__main__":
    main()
