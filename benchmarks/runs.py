"""`radio train` in a process of its own: what it took, and what it left."""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from radio.training.checkpoint import SUMS, newest_checkpoint

PR_SET_CHILD_SUBREAPER = 36
TICKS = os.sysconf("SC_CLK_TCK")
LOOK_SECONDS = 0.5


@dataclass(frozen=True)
class Run:
    """A finished run: seconds on the clock, and of every process that it started on the CPU."""

    out: Path
    wall_seconds: float
    cpu_seconds: float

    @cached_property
    def records(self) -> list[dict[str, Any]]:
        """The records of its steps."""
        lines = (self.out / "metrics.jsonl").read_text().splitlines()
        return [record for line in lines if "losses" in (record := json.loads(line))]

    @property
    def losses(self) -> list[dict[str, float]]:
        """Every step's losses."""
        return [record["losses"] for record in self.records]

    @property
    def seconds(self) -> list[float]:
        """Every step's seconds, of a run that logs each."""
        return [record["seconds"] for record in self.records]

    @property
    def fidelity(self) -> dict[str, float]:
        """The held-out rows of the trained student, by teacher, what, and resolution."""
        lines = (self.out / "metrics.jsonl").read_text().splitlines()
        *_, last = (record for line in lines if "held_out" in (record := json.loads(line)))
        return {
            f"{row['teacher']}@{row['image_size']}": row["fidelity"]
            for row in last["held_out"]
            if not row["merged"]
        }

    @property
    def weights(self) -> str:
        """SHA-256 over the trained student's weights and its optimizer's state."""
        newest = newest_checkpoint(self.out / "checkpoints")
        assert newest is not None, "a finished run ends with a checkpoint"
        lines = (newest / SUMS).read_text().splitlines()
        kept = ("model.safetensors", "optimizer.safetensors")
        return " ".join(line.split()[0] for line in lines if line.split()[1] in kept)


def command(overrides: Sequence[str]) -> list[str]:
    """Return the command line of `radio train`."""
    return [str(Path(sys.executable).with_name("radio")), "train", *overrides]


def train(out: Path, *overrides: str) -> Run:
    """Run `radio train` to its end and count what all its processes took."""
    family, started = Family(), time.perf_counter()
    with (out.parent / f"{out.name}.log").open("w") as log:
        line = command([*overrides, f"out={out}"])
        process = subprocess.Popen(line, stdout=log, stderr=subprocess.STDOUT)
        while process.poll() is None:
            time.sleep(LOOK_SECONDS)
            family.look()
    wall = time.perf_counter() - started
    if process.returncode:
        raise SystemExit(f"{log.name}: {Path(log.name).read_text()[-2000:]}")
    return Run(out, wall, family.cpu_seconds)


class Family:
    """The CPU seconds of this process's descendants from now on, as they were last looked at.

    Asking the system for those of ended children would miss Ray's: its raylet does not wait for
    them. Those whose parents ended become this process's own children.
    """

    def __init__(self) -> None:
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        self._seen: dict[tuple[int, int], float] = {}  # by pid and start
        self.look()
        self._before = sum(self._seen.values())

    @property
    def cpu_seconds(self) -> float:
        """The seconds that were seen."""
        return sum(self._seen.values()) - self._before

    def look(self) -> None:
        """Note what each descendant has taken up to now."""
        processes: dict[int, tuple[int, int, float]] = {}
        for path in Path("/proc").glob("[0-9]*/stat"):
            with suppress(OSError):  # it has ended
                said = path.read_text().rsplit(")", 1)[1].split()
                ticks = int(said[11]) + int(said[12])  # proc(5): utime, stime; 19 is starttime
                processes[int(path.parent.name)] = int(said[1]), int(said[19]), ticks / TICKS
        family = {os.getpid()}
        while more := {p for p, (parent, *_) in processes.items() if parent in family} - family:
            family |= more
        for pid in family - {os.getpid()}:
            _, start, seconds = processes[pid]
            self._seen[pid, start] = seconds


def quick(pictures: Path, *overrides: str) -> list[str]:
    """Return experiment=pocket_quick on `pictures`, with what the benchmarks of streams share."""
    return [
        "experiment=pocket_quick",
        f"data.train='{pictures}/train-*.tar'",
        f"data.val='{pictures}/val-*.tar'",
        "data.repeat_epochs=1",
        "threads={student: 1, teacher: 1}",
        *overrides,
    ]


def processes(title: str) -> list[int]:
    """Return the processes that run and whose title begins so."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            stopped = "T" in (path.parent / "stat").read_text().rsplit(")", 1)[1].split()[0]
            if path.read_bytes().startswith(title.encode()) and not stopped:
                found.append(int(path.parent.name))
    return sorted(found)
