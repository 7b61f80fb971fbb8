"""`radio train` in a process of its own: what it took, and what it left."""

from __future__ import annotations

import ctypes
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from radio.training.checkpoint import SUMS, newest_checkpoint

PR_SET_CHILD_SUBREAPER = 36
LINGERING_SECONDS = 30.0  # that processes of a cluster may live on after their run


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
    _adopt_orphans()
    before, started = _cpu_seconds(), time.perf_counter()
    with (out.parent / f"{out.name}.log").open("w") as log:
        done = subprocess.run(
            command([*overrides, f"out={out}"]), stdout=log, stderr=subprocess.STDOUT, check=False
        )
    wall = time.perf_counter() - started
    if done.returncode:
        raise SystemExit(f"{log.name}: {Path(log.name).read_text()[-2000:]}")
    _reap()
    return Run(out, wall, _cpu_seconds() - before)


def _adopt_orphans() -> None:
    """Become the parent of what a run leaves behind, so that its CPU seconds count, too."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def _reap() -> None:
    deadline = time.monotonic() + LINGERING_SECONDS
    while time.monotonic() < deadline:
        try:
            pid, _ = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid == 0:
            time.sleep(0.1)


def _cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


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
