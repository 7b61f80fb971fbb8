"""A run's metrics for TensorBoard, in out/tensorboard, with `tensorboard: true`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from radio.errors import RadioError


class Board:
    """Writes the numbers of a run's records; those from step `start` on replace older ones.

    Raises:
        RadioError: tensorboard is not installed.
    """

    def __init__(self, folder: Path, start: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise RadioError(
                "tensorboard=true needs the package: pip install tensorboard; or set "
                "tensorboard=false (metrics.jsonl and report.html have the same numbers)"
            ) from error
        self._writer = SummaryWriter(str(folder), purge_step=start + 1)

    def add(self, record: Mapping[str, Any]) -> None:
        """Write a line of metrics.jsonl, and flush, so that a killed run has shown it."""
        for name, value in scalars(record):
            self._writer.add_scalar(name, value, record["step"])
        self._writer.flush()

    def close(self) -> None:
        """End the file."""
        self._writer.close()


def scalars(record: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Yield the numbers of a record by name: losses/clip/features, waits/sam, fidelity/clip@128."""
    for key, value in record.items():
        if key == "step":
            continue
        if key == "held_out":
            for row in value:
                merged = "/merged" if row["merged"] else ""
                yield f"fidelity/{row['teacher']}@{row['image_size']}{merged}", row["fidelity"]
        elif isinstance(value, Mapping):
            yield from ((f"{key}/{name}", float(number)) for name, number in value.items())
        else:
            yield key, float(value)
