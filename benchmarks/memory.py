"""Memory of every process of a run on Ray over 2,000 steps, and what is in the object store.

    python -m benchmarks.memory [--steps 2000]

The four pocket teachers and a feeder in actors, the student in this process, two small partitions a
step. Of every process that memory counts which is its own (RssAnon): pages of the object store,
which all of them map, are counted once, as the store says. Draws docs/figures/memory.svg.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import ray
from ray._private.internal_api import get_memory_info_reply, get_state_from_address

from benchmarks.record import write
from radio.config import Config, load
from radio.data.photographs import write_photographs
from radio.data.plan import StepSpec
from radio.evaluation.figures import STYLE
from radio.targets.stream import StepBatch
from radio.targets.target_maker import Request
from radio.training.distill import distill
from ray_jobs.cluster import cluster
from ray_jobs.feature_stream import RayStream

FIGURE = Path(__file__).parents[1] / "docs" / "figures" / "memory.svg"
EVERY = 20  # steps between two looks
SETTLED = 0.2  # share of the run after which nothing should grow any more
STORE_MB = 128


def config_of(folder: Path, steps: int) -> Config:
    """Return the run."""
    teachers = ("clip", "siglip", "dinov2", "sam")
    views = "clip: native, siglip: native, dinov2: match"
    return load(
        [
            *(f"+teacher@teachers.{name}=pocket_{name}" for name in teachers),
            f"out={folder / 'run'}",
            f"data.train={folder / 'data' / 'train-000000.tar'}",
            "threads={student: 1, teacher: 1}",
            "student.image_size=128",
            "fit.steps=2",
            "checkpoint.every_steps=500",
            "log_every_steps=50",
            "cluster.feeders=1",
            f"cluster.object_store_mb={STORE_MB}",
            f"stages=[{{steps: {steps}, partitions: {{"
            f"low: {{image_size: 64, batch: 4, views: {{{views}, sam: mosaic}}}}, "
            f"high: {{image_size: 128, batch: 1, views: {{{views}, sam: native}}}}}}}}]",
        ]
    )


class Watched(RayStream):
    """Looks at every process and the store now and then."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        assert self.feeders is not None
        pools = {**self.pools, "feeder": self.feeders}
        self.pids = {
            name: ray.get(pool.replicas[0].handle.pid.remote()) for name, pool in pools.items()
        }
        self.pids["student"] = os.getpid()
        self.pids |= {name: pid for name in ("raylet", "gcs_server") if (pid := pid_of(name))}
        self.state = get_state_from_address(ray.get_runtime_context().gcs_address)
        self.seen: list[dict[str, float]] = []

    def read(
        self, specs: Iterable[StepSpec], request: Request, incarnation: int = 0
    ) -> Iterator[StepBatch]:
        for batch in super().read(specs, request, incarnation):
            yield batch
            if request.split == "train" and request.standardizers and batch.step % EVERY == 0:
                self.seen.append({"step": batch.step, **self.look()})

    def look(self) -> dict[str, float]:
        store = get_memory_info_reply(self.state).store_stats
        return {
            **{name: own_megabytes(pid) for name, pid in self.pids.items()},
            "store": store.object_store_bytes_used / 1e6,
            "spilled": store.spilled_bytes_total / 1e6,
            "fallback": store.object_store_bytes_fallback / 1e6,
        }


def own_megabytes(pid: int) -> float:
    """Return the megabytes that a process shares with no other."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024


def pid_of(name: str) -> int | None:
    """Return the newest process of this name."""
    found = [
        int(path.parent.name)
        for path in Path("/proc").glob("[0-9]*/comm")
        if path.read_text().strip() == name
    ]
    return max(found, default=None)


def growth(steps: list[float], values: list[float]) -> float:
    """Return the MB that a thousand steps add once a run has settled (Theil and Sen)."""
    kept = [
        (step, value)
        for step, value in zip(steps, values, strict=True)
        if step >= SETTLED * steps[-1]
    ]
    slopes = [
        (later - value) / (after - step)
        for at, (step, value) in enumerate(kept)
        for after, later in kept[at + 1 :]
    ]
    return 1000 * statistics.median(slopes)


def draw(seen: list[dict[str, float]], path: Path) -> None:
    """Draw own memory of every process, and below it what is in the store."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({**STYLE, "font.size": 8, "svg.hashsalt": path.stem}):
        figure = Figure(figsize=(7.2, 5.0), layout="constrained")
        above, below = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
        steps = [look["step"] for look in seen]
        names = [name for name in seen[0] if name not in ("step", "store", "spilled", "fallback")]
        for name in sorted(names, key=lambda name: -seen[-1][name]):
            above.plot(steps, [look[name] for look in seen], label=name)
        above.set_ylabel("own memory, MB")
        above.set_ylim(bottom=0)
        above.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
        below.plot(steps, [look["store"] for look in seen], color="0.3")
        below.axhline(STORE_MB * (1 << 20) / 1e6, color="0.6", linestyle="--")
        below.set_ylabel("object store, MB")
        below.set_ylim(bottom=0)
        below.set_xlabel("step")
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, metadata={"Date": None, "Creator": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--figure", type=Path, default=FIGURE)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_photographs(folder / "data")
        config = config_of(folder, options.steps)
        with cluster(config.cluster), Watched(config) as stream:
            distill(config, stream)
            seen = stream.seen
    draw(seen, options.figure)
    steps = [look["step"] for look in seen]
    columns: dict[str, Any] = {name: [look[name] for look in seen] for name in seen[0]}
    processes = [name for name in stream.pids]
    write(
        "memory",
        {
            "what": "own memory of every process, and bytes in the object store, in MB",
            "steps": options.steps,
            "growth_mb_per_1000_steps": {n: growth(steps, columns[n]) for n in processes},
            "median_mb": {n: statistics.median(columns[n]) for n in processes},
            "most_mb": {n: max(columns[n]) for n in processes},
            "store": {
                "bound_mb": STORE_MB * (1 << 20) / 1e6,
                "most_mb": max(columns["store"]),
                "spilled_mb": columns["spilled"][-1],
                "fallback_mb": max(columns["fallback"]),
            },
            "seen": columns,
        },
    )


if __name__ == "__main__":
    main()
