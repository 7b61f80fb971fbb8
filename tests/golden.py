"""The golden losses of a tiny run. `make golden` rewrites them after a change of numerics."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from tiny import tiny_config

from radio.training.distill import distill

GOLDEN = Path(__file__).parent / "golden" / "tiny_losses.json"


def tiny_losses(folder: Path) -> list[dict[str, float]]:
    """Train 20 steps and return the losses of each."""
    config = tiny_config(folder, steps=20)
    config.student.size = "tiny"
    out = distill(config).out
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [record["losses"] for record in records if "losses" in record]


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        losses = tiny_losses(Path(folder))
    GOLDEN.parent.mkdir(exist_ok=True)
    GOLDEN.write_text(json.dumps(losses, indent=1) + "\n")
