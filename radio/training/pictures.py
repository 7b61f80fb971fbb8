"""Pictures for the report: teacher's and student's features of the same held-out photograph."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

import torch

from radio.data.plan import Plan, StepSpec
from radio.targets.stream import Stream
from radio.targets.target_maker import Request
from radio.training.report import Picture
from student.model import Student

COUNT = 4


@torch.inference_mode()
def report_pictures(
    student: Student,
    stream: Stream,
    plan: Plan,
    request: Request,
    incarnation: int,
    device: torch.device,
) -> list[Picture]:
    """Return the pictures of `report_spec`; none without held-out ones."""
    spec = report_spec(plan, stream, request.standardizers)
    if spec is None:
        return []
    batch = next(iter(stream.read([spec], request, incarnation))).partitions[0]
    chosen = spec.partitions[0].views
    student.eval()
    outputs = student(batch.images.to(device), window=batch.window)
    keys = [stream.sources["val"].key(view.sample) for view in chosen]
    return [
        Picture(
            key,
            batch.images[number],
            {
                name: (target.features[number], outputs[name].features[number].float().cpu())
                for name, target in batch.targets.items()
            },
        )
        for number, key in enumerate(keys)
    ]


def report_spec(
    plan: Plan, stream: Stream, teachers: Collection[str], count: int = COUNT
) -> StepSpec | None:
    """Return `count` held-out views, evenly spaced, at the largest resolution of the last stage."""
    if "val" not in stream.sources:
        return None
    num_samples = len(stream.sources["val"])
    held_out = plan.held_out(num_samples, num_samples, teachers)
    largest = max(held_out, key=lambda partition: partition.image_size)
    chosen = [largest.views[at * num_samples // count] for at in range(min(count, num_samples))]
    order = tuple(range(len(chosen)))
    return StepSpec(0, 0, 0, (replace(largest, views=tuple(chosen), order=order),))
