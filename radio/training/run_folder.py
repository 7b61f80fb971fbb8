"""A run's folder: config.yaml, metrics.jsonl, checkpoints/, standardizers/, report.html, encoder/.

One process at a time may hold it; the same command finds it again and resumes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from radio.config import Config, from_yaml, to_yaml
from radio.errors import RadioError
from radio.files import write_whole

# What may differ between a run and its resumption without changing what it computes.
FREE = (
    "out",
    "stream",
    "cache",
    "cluster",
    "checkpoint",
    "log_every_steps",
    "tensorboard",
    "evaluation",
    "threads",
    "device",
    "parallel.kind",
    "parallel.placement",
    "parallel.workers",
    "parallel.min_workers",
    "parallel.labels",
)
NEWEST_BYTES = 1 << 16  # of metrics.jsonl that surely hold its newest record
HELD_SECONDS = 60.0  # that a process which was killed may still hold its run's folder


@dataclasses.dataclass(frozen=True)
class RunFolder:
    """Paths and the metrics file of one run; of several processes only the leading one writes."""

    path: Path
    leads: bool = True

    @property
    def checkpoints(self) -> Path:
        """Where checkpoints are."""
        return self.path / "checkpoints"

    @property
    def metrics(self) -> Path:
        """One JSON object a line, in order of steps."""
        return self.path / "metrics.jsonl"

    def append(self, record: dict[str, Any]) -> None:
        """Add one record to metrics.jsonl."""
        if not self.leads:
            return
        with self.metrics.open("a") as file:
            file.write(json.dumps(record) + "\n")

    def records(self) -> list[dict[str, Any]]:
        """Return every whole record of metrics.jsonl; a line cut by a crash is left out."""
        if not self.metrics.exists():
            return []
        records = []
        for line in self.metrics.read_text().splitlines():
            try:
                records.append(json.loads(line))
            except json.JSONDecodeError:
                break
        return records

    def newest(self) -> dict[str, Any] | None:
        """Return the newest record of a step, without reading all that is before it."""
        if not self.metrics.exists():
            return None
        with self.metrics.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - NEWEST_BYTES))
            lines = file.read().splitlines()
        for line in reversed(lines):
            with contextlib.suppress(ValueError):  # cut off, or being written
                record = json.loads(line)
                if isinstance(record, dict) and "losses" in record:
                    return record
        return None

    def cut(self, step: int) -> None:
        """Drop the records of steps that were not finished at `step`."""
        if not self.leads:
            return
        kept = [record for record in self.records() if record["step"] <= step]
        write_whole(self.metrics, "".join(json.dumps(record) + "\n" for record in kept))

    def write_config(self, config: Config) -> None:
        """Write the resolved configuration, refusing another run's folder."""
        path = self.path / "config.yaml"
        if path.exists():
            refuse_changes(from_yaml(path.read_text()), config, self.path)
        write_whole(path, to_yaml(config))


def refuse_changes(before: Config, now: Config, where: Path) -> None:
    """Refuse to resume `where` with a configuration that would compute something else."""
    old, new = _flat(dataclasses.asdict(before)), _flat(dataclasses.asdict(now))
    changed = sorted(
        key
        for key in old.keys() | new.keys()
        if old.get(key) != new.get(key) and not f"{key}.".startswith(tuple(f"{f}." for f in FREE))
    )
    if changed:
        lines = "".join(f"\n  {key}: {old.get(key)} -> {new.get(key)}" for key in changed[:8])
        raise RadioError(
            f"{where} holds a run with another configuration:{lines}\n"
            "choose another out=, or delete the folder to start anew"
        )


@contextmanager
def open_run(config: Config, leads: bool = True) -> Iterator[RunFolder]:
    """Hold the run's folder; a second run is refused, a dead one's hold is gone."""
    path = Path(config.out)
    if not leads:
        yield RunFolder(path, leads=False)
        return
    with hold(path, ".lock", 0.0 if config.parallel.workers is None else HELD_SECONDS):
        run = RunFolder(path)
        run.write_config(config)
        yield run


@contextmanager
def hold(path: Path, lock: str, seconds: float = 0.0) -> Iterator[None]:
    """Make a run's folder and hold it for this process, by a lock file that dies with it.

    Raises:
        RadioError: the folder cannot be made, or another process holds it for `seconds`.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = "the disk is full" if error.errno == errno.ENOSPC else str(error)
        raise RadioError(f"cannot make out={path}: {reason}") from error
    held = FileLock(path / lock)
    try:
        held.acquire(timeout=seconds)
    except Timeout as error:
        raise RadioError(
            f"another process is writing to {path}; wait for it, stop it, or choose another out="
        ) from error
    try:
        yield
    finally:
        held.release()


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list):
        items = {str(number): item for number, item in enumerate(value)}.items()
    else:
        return {prefix.removesuffix("."): value}
    return {
        key: leaf for name, item in items for key, leaf in _flat(item, f"{prefix}{name}.").items()
    }
