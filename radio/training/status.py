"""Where a run stands and who waits for whom, from its folder alone; `radio status RUN`."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from radio.config import Config, from_yaml
from radio.errors import RadioError
from radio.training.checkpoint import newest_checkpoint
from radio.training.run_folder import RunFolder

LAST = 20  # logged steps whose medians are told
LITTLE = 0.05  # a smaller share of a step spent waiting is nothing to mend


@dataclass(frozen=True)
class TeacherStatus:
    """A teacher in a step: its own seconds, those that the student waited for it, bytes sent."""

    name: str
    busy_seconds: float
    waited_seconds: float
    wait_share: float
    num_bytes: float


@dataclass(frozen=True)
class Status:
    """Steps done of those planned, medians of the last LAST logged steps, and what to do.

    `state` is finished, running (a process holds the folder), or stopped.
    """

    out: str
    state: str
    step: int
    planned: int
    saved: int
    seconds_per_step: float | None
    images_per_second: float | None
    wait_share: float | None
    eta_seconds: float | None
    teachers: tuple[TeacherStatus, ...]
    advice: str

    def as_dict(self) -> dict[str, Any]:
        """Return it for JSON."""
        return asdict(self)


def status(run: Path) -> Status:
    """Return where a run stands.

    Raises:
        RadioError: the folder is no run's.
    """
    folder = RunFolder(run)
    file = run / "config.yaml"
    if not file.exists():
        raise RadioError(
            f"{run} has no config.yaml; expected the folder that `radio train` writes (its out=)"
        )
    config = from_yaml(file.read_text())
    steps = [record for record in folder.records() if "losses" in record]
    planned = sum(stage.steps for stage in config.stages)
    newest = newest_checkpoint(folder.checkpoints)
    saved = 0 if newest is None else int(newest.name.rpartition("-")[2])
    step = int(steps[-1]["step"]) if steps else 0
    last = steps[-LAST:]
    seconds = _median(last, "seconds")
    teachers = tuple(_teacher(name, last) for name in config.teachers) if last else ()
    state = "finished" if saved == planned else "running" if _is_held(run) else "stopped"
    left = None if seconds is None or saved == planned else seconds * (planned - step)
    return Status(
        str(run),
        state,
        step,
        planned,
        saved,
        seconds,
        _median(last, "images_per_second"),
        _median(last, "wait_share"),
        left,
        teachers,
        advice(config, teachers, _median(last, "wait_share")),
    )


def advice(config: Config, teachers: Sequence[TeacherStatus], wait_share: float | None) -> str:
    """Return who waits for whom, and the key that changes it."""
    if wait_share is None:
        return "no step is logged yet"
    if wait_share < LITTLE:
        return f"teachers wait for the student, which waits {wait_share:.0%} of a step for them"
    if config.stream == "local":
        return (
            f"teachers and student take turns in one process, {wait_share:.0%} of a step is the "
            "teachers'; stream=ray lets them work at the same time"
        )
    if not any(teacher.waited_seconds for teacher in teachers):
        return f"{wait_share:.0%} of a step goes into reading targets and pictures"
    slowest = max(teachers, key=lambda teacher: teacher.waited_seconds)
    pool = config.cluster.pools.get(slowest.name)
    replicas = (pool and pool.replicas) or config.cluster.replicas
    return (
        f"the student waits {wait_share:.0%} of a step, most of all for '{slowest.name}'; where "
        f"there is room, give it {replicas + 1} replicas (cluster.pools)"
    )


def _teacher(name: str, records: Sequence[Mapping[str, Any]]) -> TeacherStatus:
    def median(key: str) -> float:
        return float(statistics.median(r.get(key, {}).get(name, 0.0) for r in records))

    shares = [
        record.get("waits", {}).get(name, 0.0) / max(record["seconds"], 1e-9) for record in records
    ]
    waited = min(1.0, statistics.median(shares))
    return TeacherStatus(name, median("busy_seconds"), median("waits"), waited, median("bytes"))


def _median(records: Sequence[Mapping[str, Any]], key: str) -> float | None:
    return statistics.median(record[key] for record in records) if records else None


def _is_held(run: Path) -> bool:
    """Return whether a process trains in the folder now."""
    if not (run / ".lock").exists():
        return False
    lock = FileLock(run / ".lock")
    try:
        lock.acquire(timeout=0)
    except (Timeout, PermissionError):
        return True
    lock.release()
    return False
