"""What a replica that is killed or stopped costs where passes leave the processor alone.

    python -m benchmarks.recovery [--faults 8] [--seed 0]

On the two cores of chaos.py a replica that is started anew takes from everybody what it needs to
load; with teachers on GPUs it does not. Here two teachers of two replicas each rest for
`PASS_SECONDS` a step, and a student that rests for `STEP_SECONDS` reads the real stream. At seeded
moments of a pass a replica is killed (SIGKILL), or stops for good (SIGSTOP). A fault's stall is how
long the student stood still for its teachers until the next fault.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray

from benchmarks.record import write
from benchmarks.runs import processes
from radio.config import Config, load
from radio.data.configured import training_plan
from radio.data.photographs import write_photographs
from radio.targets.fit import fit
from radio.targets.target_maker import CodedTarget, Request
from ray_jobs import placement
from ray_jobs.actors import TeacherActor
from ray_jobs.cluster import cluster
from ray_jobs.feature_stream import RayStream

PASS_SECONDS = 2.0
STEP_SECONDS = 1.25  # two replicas make a step a second: the student is the slower one
APART = 12  # steps between two faults: a replica is back by then
KINDS = {"killed": signal.SIGKILL, "stopped": signal.SIGSTOP}


class Resting(TeacherActor):
    """A teacher whose passes take long and use nothing."""

    def encode(self, *arguments: Any) -> dict[int, CodedTarget]:
        started = time.perf_counter()
        targets = super().encode(*arguments)
        if arguments[2].standardizers:  # no fit
            time.sleep(max(0.0, PASS_SECONDS - (time.perf_counter() - started)))
        seconds = (time.perf_counter() - started) / len(targets)
        return {number: replace(target, seconds=seconds) for number, target in targets.items()}


def config_of(folder: Path) -> Config:
    """Return the run."""
    return load(
        [
            *(f"+teacher@teachers.{name}=fake" for name in ("words", "parts")),
            f"out={folder / 'run'}",
            f"data.train={folder / 'data' / 'train-000000.tar'}",
            "data.val=null",
            "fit.steps=2",
            "cluster.replicas=2",
            "cluster.object_store_mb=256",
            "cluster.call_timeout_seconds=15",
            "stages=[{steps: 100000, partitions: {all: "
            "{image_size: 64, batch: 4, views: {words: native, parts: native}}}}]",
        ]
    )


def stalls(
    config: Config, stream: RayStream, how: signal.Signals | None, faults: int, seed: int
) -> list[float]:
    """Return the seconds that the student stood still, from each fault to the next."""
    request = Request("train", config.codec, fit(config, stream))
    plan = training_plan(config, len(stream.sources["train"]))
    generator, found = random.Random(seed), list[float]()
    steps = APART * (faults + 1)
    batches = stream.read((plan(step) for step in range(steps)), request)
    for step in range(steps):
        started = time.perf_counter()
        next(batches)
        if step % APART == 0:
            found.append(0.0)
        found[-1] += time.perf_counter() - started
        at = generator.uniform(0, STEP_SECONDS)
        time.sleep(at)
        if how is not None and step % APART == APART - 1 and step < steps - 1:
            strike(how, generator)
        time.sleep(STEP_SECONDS - at)
    return found[1:]  # the first one fills the pipe


def strike(how: signal.Signals, generator: random.Random) -> None:
    """Signal a replica in the middle of a pass."""
    os.kill(generator.choice(until(lambda: processes("ray::Resting.encode"))), how)


def until(look: Callable[[], list[int]]) -> list[int]:
    """Return what is found, once something is."""
    while not (found := look()):
        time.sleep(0.01)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--faults", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    ray.cloudpickle.register_pickle_by_value(sys.modules[Resting.__module__])
    placement.TeacherActor = Resting  # type: ignore[misc]
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_photographs(folder / "data")
        config = config_of(folder)
        with cluster(config.cluster):
            for kind, how in (("undisturbed", None), *KINDS.items()):
                with RayStream(config) as stream:
                    taken = stalls(config, stream, how, options.faults, options.seed)
                    figures[kind] = {
                        "median": statistics.median(taken),
                        "most": max(taken),
                        "each": taken,
                        "retries": stream.retries,
                        "hedges": sum(pool.hedges for pool in stream.pools.values()),
                    }
    write(
        "recovery",
        {
            "what": "seconds that a student stood still for teachers, from a fault to the next",
            "pass_seconds": PASS_SECONDS,
            "step_seconds": STEP_SECONDS,
            "faults": options.faults,
            "stall_seconds": figures,
        },
    )


if __name__ == "__main__":
    main()
