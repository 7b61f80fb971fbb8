"""A step with its teachers on Ray over the longer of the teachers' and the student's own time.

    python -m benchmarks.overlap [--steps 16] [--rounds 3] [--seconds 1.0]

Real work, a core each: a seeded DINOv2 ViT-S of 224 px against a training step of a ViT-Ti, f32.
How many pictures of a step the teacher sees, and how many more the student alone, is chosen in
place so that teacher to student take 1:4, 1:1 and 4:1, the longer of them `--seconds`. What one
would write by hand runs in the same rounds: two processes and a pipe, with as many steps in flight.

Then the path of features out of an actor: bytes a second over a memcpy of as many.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from collections import deque
from collections.abc import Iterator
from functools import cache
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch

from benchmarks.record import write
from radio.config import Config, load
from radio.data.configured import training_plan
from radio.data.photographs import write_photographs
from radio.data.plan import StepSpec
from radio.targets import codec
from radio.targets.fit import fit
from radio.targets.stream import Coded, StepBatch, batches, open_sources, read_by
from radio.targets.target_maker import CodedTarget, Request, build_readers, build_target_maker
from radio.training.learner import Learner
from radio.training.step import training_step
from ray_jobs.cluster import cluster
from ray_jobs.feature_stream import RayStream

RATIOS = {"1:4": (0.25, 1.0), "1:1": (1.0, 1.0), "4:1": (1.0, 0.25)}
PROBE = (4, 12)  # pictures for the teacher, and for the student alone, by which costs are measured
MEGABYTES = (1, 10, 50)
WINDOW = 2
CPU = torch.device("cpu")
ALL_STEPS = 100_000  # of the plan; how many of them are run is said at each place


def config_of(folder: Path, seen: int, unseen: int) -> Config:
    """Return a run whose teacher sees `seen` pictures of a step, and the student `unseen` more."""
    parts = [f"both: {{image_size: 128, batch: {seen}, views: {{dinov2: native, cheap: match}}}}"]
    if unseen:
        parts.append(f"student: {{image_size: 128, batch: {unseen}, views: {{cheap: match}}}}")
    return load(
        [
            "+teacher@teachers.dinov2=dinov2_s14_reg",
            "+teacher@teachers.cheap=fake",
            "teachers.dinov2.pretrained=null",
            "teachers.dinov2.options.native_size=224",
            "teachers.dinov2.card.native_size=224",
            f"stages=[{{steps: {ALL_STEPS}, partitions: {{{', '.join(parts)}}}}}]",
            f"out={folder / 'run'}",
            f"data.train={folder / 'data' / 'train-000000.tar'}",
            "data.val=null",
            "threads={student: 1, teacher: 1}",
            f"cluster.window={WINDOW}",
            "fit.steps=2",
        ]
    )


@cache
def cores() -> tuple[int, int]:
    """Return the student's core and the teachers'; asked first before this process is pinned."""
    student, teacher, *_ = sorted(os.sched_getaffinity(0))
    return student, teacher


def pin(pid: int, core: int) -> None:
    """Give every thread of a process this core alone."""
    for task in Path(f"/proc/{pid}/task").iterdir():
        os.sched_setaffinity(int(task.name), {core})


class ByHand:
    """Teachers in another process at the end of a pipe, as many steps ahead."""

    def __init__(self, config: Config, request: Request) -> None:
        context = multiprocessing.get_context("spawn")
        self.here, there = context.Pipe()
        self.process = context.Process(target=serve, args=(there, config, request), daemon=True)
        self.process.start()
        self.here.recv()  # it is ready
        assert self.process.pid is not None
        pin(self.process.pid, cores()[1])

    def encode(self, specs: Iterator[StepSpec]) -> Iterator[tuple[StepSpec, Coded]]:
        waiting: deque[StepSpec] = deque()
        for spec in specs:
            self.here.send(spec)
            waiting.append(spec)
            if len(waiting) > WINDOW:
                yield waiting.popleft(), self.here.recv()
        while waiting:
            yield waiting.popleft(), self.here.recv()

    def close(self) -> None:
        self.here.send(None)
        self.process.join()


def serve(there: Connection, config: Config, request: Request) -> None:
    torch.set_num_threads(1)
    readers = build_readers(config, open_sources(config))
    makers = {name: build_target_maker(config, name, readers, CPU) for name in config.teachers}
    there.send("ready")
    while (spec := there.recv()) is not None:
        there.send(
            [{name: makers[name](part, request) for name in part.modes} for part in spec.partitions]
        )


class Bench:
    """One mix of pictures: a stream on Ray, two processes by hand, a student, each on its core."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.stream = RayStream(config)
        for pool in self.stream.pools.values():
            for replica in pool.replicas:
                pin(ray.get(replica.handle.pid.remote()), cores()[1])
        self.plan = training_plan(config, len(self.stream.sources["train"]))
        self.request = Request("train", config.codec, fit(config, self.stream))
        self.reader = build_readers(config, self.stream.sources)["train"]
        self.by_hand = ByHand(config, self.request)
        torch.manual_seed(0)
        self.learner = Learner(config, self.stream.teachers, CPU)
        self.learner.student.train()
        self.next = 0

    def specs(self, count: int) -> Iterator[StepSpec]:
        self.next += count
        return (self.plan(step) for step in range(self.next - count, self.next))

    def train(self, batch: StepBatch) -> None:
        training_step(self.learner, batch, self.config, self.plan, CPU)

    def coded(self, count: int) -> list[tuple[StepSpec, Coded]]:
        return list(self.stream.encode(self.specs(count), self.request))

    def teacher_seconds(self, count: int) -> float:
        """Return the teachers' own seconds a step while the student rests."""
        return statistics.median(
            sum(target.seconds for part in step for target in part.values())
            for _, step in self.coded(count)
        )

    def student_seconds(self, count: int) -> float:
        """Return the student's seconds a step, reading its views included; its targets are here."""
        return self.seconds(iter(self.coded(count)))

    def ray_seconds(self, count: int) -> float:
        """Return the seconds a step of both by our stream."""
        return self._paced(self.stream.read(self.specs(count), self.request))

    def hand_seconds(self, count: int) -> float:
        """Return the seconds a step of both by the loop of two processes."""
        return self.seconds(self.by_hand.encode(self.specs(count)))

    def seconds(self, coded: Iterator[tuple[StepSpec, Coded]]) -> float:
        read = read_by(self.reader)
        return self._paced(batches(coded, read, self.request, self.config))

    def _paced(self, steps: Iterator[StepBatch]) -> float:
        """Return the seconds a step once the first two are done, which fill the pipe."""
        ends = []
        for batch in steps:
            self.train(batch)
            ends.append(time.perf_counter())
        return (ends[-1] - ends[1]) / (len(ends) - 2)

    def close(self) -> None:
        self.by_hand.close()
        self.stream.close()


def costs(folder: Path) -> tuple[float, float]:
    """Return what a picture costs the teachers, and the student, in seconds."""
    seen, unseen = PROBE
    bench = Bench(config_of(folder, seen, unseen))
    try:
        bench.student_seconds(4)  # warm
        return bench.teacher_seconds(6) / seen, bench.student_seconds(6) / (seen + unseen)
    finally:
        bench.close()


def overlap(folder: Path, seen: int, unseen: int, steps: int, rounds: int) -> dict[str, Any]:
    """Measure one mix in rounds of all that is compared."""
    bench = Bench(config_of(folder, seen, unseen))
    try:
        bench.ray_seconds(4), bench.hand_seconds(4)  # warm
        said = []
        for _ in range(rounds):
            teacher, student = bench.teacher_seconds(steps // 2), bench.student_seconds(steps // 2)
            ours, by_hand = bench.ray_seconds(steps), bench.hand_seconds(steps)
            longer = max(teacher, student)
            said.append(
                {
                    "teacher_seconds": teacher,
                    "student_seconds": student,
                    "ray_seconds": ours,
                    "by_hand_seconds": by_hand,
                    "ray_over_longer": ours / longer,
                    "by_hand_over_longer": by_hand / longer,
                    "ray_over_by_hand": ours / by_hand,
                }
            )
    finally:
        bench.close()
    medians = {key: statistics.median(each[key] for each in said) for key in said[0]}
    return {"pictures": {"teacher": seen, "student": seen + unseen}, **medians, "rounds": said}


@ray.remote(num_cpus=1)
class Source:
    """Returns features as a teacher does, which it has computed already."""

    def __init__(self, megabytes: int) -> None:
        self.features = np.ones(megabytes << 19, np.uint16)

    def give(self) -> CodedTarget:
        return CodedTarget(None, self.features, np.ones(0, bool), (), {}, 0.0)


def path_of_features(megabytes: int, times: int = 9) -> dict[str, float]:
    """Time a target's way from an actor to the student's process, and on to its float32 tensor."""
    source = Source.remote(megabytes)
    arrived, decoded, copied = [], [], []
    for _ in range(times + 2):
        there = np.ones(megabytes << 19, np.uint16)
        here = np.empty_like(there)
        started = time.perf_counter()
        np.copyto(here, there)
        copied.append(time.perf_counter() - started)
        started = time.perf_counter()
        target = ray.get(source.give.remote())
        arrived.append(time.perf_counter() - started)
        codec.decode(target.features, "bf16")
        decoded.append(time.perf_counter() - started)
        del target
    ray.kill(source)
    rates = {
        name: (megabytes << 20) / 1e9 / statistics.median(seconds[2:])
        for name, seconds in (("memcpy", copied), ("arrived", arrived), ("decoded", decoded))
    }
    return {
        "megabytes": megabytes,
        **{f"{name}_gb_s": rate for name, rate in rates.items()},
        "arrived_over_memcpy": rates["arrived"] / rates["memcpy"],
        "decoded_over_memcpy": rates["decoded"] / rates["memcpy"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=1.0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_photographs(folder / "data")
        config = config_of(folder, 1, 0)
        with cluster(config.cluster):
            pin(os.getpid(), cores()[0])
            teacher, student = costs(folder)
            found = {}
            for ratio, (wanted_teacher, wanted_student) in RATIOS.items():
                seen = max(1, round(options.seconds * wanted_teacher / teacher))
                unseen = max(0, round(options.seconds * wanted_student / student) - seen)
                found[ratio] = overlap(folder, seen, unseen, options.steps, options.rounds)
                print(ratio, json.dumps({**found[ratio], "rounds": None}), flush=True)
            paths = [path_of_features(megabytes) for megabytes in MEGABYTES]
    write(
        "overlap",
        {
            "what": "a step with teachers on Ray over the longer of teachers' and student's time",
            "steps": options.steps,
            "teacher_to_student": found,
            "path_of_features": paths,
        },
    )


if __name__ == "__main__":
    main()
