"""Our training step over a bare PyTorch loop of the same models and batch, in one process.

    python -m benchmarks.step_overhead [--steps 22] [--no-ray]

The demo's four teachers and student. The bare loop is what one would write by hand: read and crop
the pictures, run each teacher, standardize, run the student, losses, backward, optimizer. Steps of
both loops alternate, and so does which goes first, so that a busy machine disturbs both alike; the
figure is the median of the ratios. Then the same steps run with the teachers in Ray actors, set
against the bare loop's median: below 1, since teachers work beside the student there.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F

from benchmarks.record import write
from radio.config import Config
from radio.data.configured import training_plan
from radio.data.mosaic import Mosaic
from radio.data.photographs import write_photographs
from radio.data.plan import Plan, StepSpec, seed_for
from radio.targets.fit import fit, read_fitted
from radio.targets.stream import LocalStream, Stream
from radio.targets.target_maker import Request, build_readers
from radio.targets.view_modes import VIEW_MODES
from radio.training.learner import Learner, student_for
from radio.training.optim import build_optimizer, learning_rate, set_learning_rate
from radio.training.step import training_step
from ray_jobs.demo import demo_config
from student.model import Student


class BareLoop:
    """The same step without our machinery."""

    def __init__(self, config: Config, stream: LocalStream, files: dict) -> None:
        self.config, self.stream = config, stream
        self.student = fresh_student(config, stream)
        self.optimizer = build_optimizer(self.student, config.optimizer)
        self.standardizers = read_fitted(files)
        self.reader = build_readers(config, stream.sources)["train"]

    def step(self, spec: StepSpec) -> float:
        schedule = self.config.optimizer
        steps = self.config.stages[0].steps
        rate = learning_rate(schedule.lr, schedule.warmup_steps, spec.stage_step, steps)
        set_learning_rate(self.optimizer, rate)
        per_view: dict[str, list[torch.Tensor]] = {}  # loss of each view, and its weight
        weights: dict[str, list[torch.Tensor]] = {}
        for part in spec.partitions:
            targets = {name: self.target(name, part) for name in part.modes}
            images = self.reader.batch(part.views, part.image_size).pixels
            # Positions are random, and drawn by partition.
            torch.manual_seed(seed_for(self.config.seed, f"student/{part.name}", spec.step, 0))
            outputs = self.student(images, merge_per_block=part.merge_per_block)
            for name, (summary, features) in targets.items():
                predicted = to_side(outputs[name].features, features.shape[-1])
                losses = {"features": (predicted - features).square().mean((1, 2, 3))}
                sides = {"features": float(features.shape[-1]), "summary": 1.0}
                if summary is not None:
                    losses["summary"] = 1 - F.cosine_similarity(outputs[name].summary, summary)
                for what, values in losses.items():
                    per_view.setdefault(f"{name}/{what}", []).append(values)
                    weights.setdefault(f"{name}/{what}", []).append(
                        torch.full_like(values, sides[what])
                    )
        total = torch.zeros(())
        for name, values in per_view.items():
            weight = torch.cat(weights[name])
            total = total + (torch.cat(values) * weight).sum() / weight.sum()
        total.backward()
        torch.nn.utils.clip_grad_norm_(self.student.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return total.item()

    def target(self, name, part):
        maker = self.stream.makers[name]
        teacher, mode = maker.teacher, part.modes[name]
        pixels = self.reader.batch(part.views, VIEW_MODES[mode].size(maker.shown(part))).pixels
        with torch.inference_mode():
            torch.set_num_threads(self.config.threads.teacher)
            x = (pixels.float() / 255 - torch.tensor(teacher.mean).view(1, 3, 1, 1)) / torch.tensor(
                teacher.std
            ).view(1, 3, 1, 1)
            mosaic = None
            if mode == "mosaic":
                mosaic = Mosaic(teacher.native_size, part.image_size, teacher.stride)
                x = mosaic.place(x[list(part.order)])
            outputs = [teacher(piece) for piece in x.split(self.config.data.micro_batch)]
            features = torch.cat([output.features for output in outputs])
            if mosaic is not None:
                windows = mosaic.split(features, len(pixels))
                features = torch.empty_like(windows)
                features[list(part.order)] = windows
            features = self.standardizers[name].transform_map(features)
            side = part.image_size // self.config.student.patch_size
            features = to_side(features, min(side, features.shape[-1]))
            torch.set_num_threads(self.config.threads.student)
        summary = None
        if mode != "mosaic" and outputs[0].summary is not None:
            summary = torch.cat([output.summary for output in outputs]).clone()
        return summary, features.clone()


def to_side(features: torch.Tensor, side: int) -> torch.Tensor:
    if features.shape[-1] == side:
        return features
    return F.interpolate(features, size=(side, side), mode="bilinear", antialias=True)


def fresh_student(config: Config, stream: Stream) -> Student:
    torch.manual_seed(seed_for(config.seed, "student"))
    return student_for(config, stream.teachers).train()


def ours(
    config: Config, stream: Stream, plan: Plan, files: dict, steps: int
) -> Iterator[tuple[float, float, float]]:
    """Yield (seconds of each step, seconds that the student's own part took, loss)."""
    device = torch.device("cpu")
    learner = Learner(config, stream.teachers, device)
    learner.student.train()
    batches = stream.read((plan(step) for step in range(steps)), Request("train", "bf16", files))
    while True:
        started = time.perf_counter()
        batch = next(batches, None)
        if batch is None:
            return
        arrived = time.perf_counter()
        losses = training_step(learner, batch, config, plan, device)
        values = torch.stack(list(losses.values())).tolist()
        ended = time.perf_counter()
        yield ended - started, ended - arrived, sum(values)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=22)
    parser.add_argument("--no-ray", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        config = demo_config([f"out={folder}", "stream=local"])
        write_photographs(Path(folder) / "data")
        figures = measure(config, arguments.steps)
        if not arguments.no_ray:
            figures |= measure_ray(config, arguments.steps, figures)
    write("step_overhead", figures)


def timed(bare: BareLoop, spec: StepSpec) -> tuple[float, float]:
    started = time.perf_counter()
    loss = bare.step(spec)
    return time.perf_counter() - started, loss


def measure(config: Config, steps: int) -> dict:
    with LocalStream(config) as stream:
        plan = training_plan(config, len(stream.sources["train"]))
        files = fit(config, stream)
        bare = BareLoop(config, stream, files)
        mine = ours(config, stream, plan, files, steps)
        pairs, student_seconds = [], []
        for step in range(steps):
            if step % 2:
                theirs, their_loss = timed(bare, plan(step))
                seconds, student, loss = next(mine)
            else:
                seconds, student, loss = next(mine)
                theirs, their_loss = timed(bare, plan(step))
            # Both do the same work. Only the targets' bf16 rounding is ours alone, and grows.
            if step < 8:
                assert abs(loss - their_loss) < 0.01 * their_loss, (step, loss, their_loss)
            pairs.append((seconds, theirs))
            student_seconds.append(student)
    pairs, student_seconds = pairs[2:], student_seconds[2:]  # the first steps warm up
    return {
        "what": "seconds per step of the demo's models, 16 views at 128 px and 4 at 256 px",
        "steps": len(pairs),
        "ours_seconds": statistics.median(a for a, _ in pairs),
        "bare_seconds": statistics.median(b for _, b in pairs),
        "ratio": statistics.median(a / b for a, b in pairs),
        "student_seconds": statistics.median(student_seconds),
    }


def measure_ray(config: Config, steps: int, local: dict) -> dict:
    from ray_jobs.cluster import cluster
    from ray_jobs.feature_stream import RayStream

    with cluster(config.cluster), RayStream(config) as stream:
        plan = training_plan(config, len(stream.sources["train"]))
        files = fit(config, stream)
        seconds = [step[0] for step in ours(config, stream, plan, files, steps)][2:]
    median = statistics.median(seconds)
    return {"ray_seconds": median, "ray_over_bare": median / local["bare_seconds"]}


if __name__ == "__main__":
    main()
