"""Pictures for the report: teacher's and student's features of the same held-out photograph."""

from __future__ import annotations

from dataclasses import replace

import torch

from radio.data.plan import Plan, StepSpec
from radio.targets.stream import Stream
from radio.targets.target_maker import Request
from radio.training.report import Picture
from student.model import Student


@torch.inference_mode()
def report_pictures(
    student: Student,
    stream: Stream,
    plan: Plan,
    request: Request,
    incarnation: int,
    device: torch.device,
    count: int = 4,
) -> list[Picture]:
    """Return `count` held-out views, evenly spaced, at the largest resolution of the last stage."""
    if "val" not in stream.sources:
        return []
    num_samples = len(stream.sources["val"])
    held_out = plan.held_out(num_samples, num_samples, request.standardizers)
    largest = max(held_out, key=lambda partition: partition.image_size)
    chosen = [largest.views[at * num_samples // count] for at in range(min(count, num_samples))]
    spec = StepSpec(
        0, 0, 0, (replace(largest, views=tuple(chosen), order=tuple(range(len(chosen)))),)
    )
    batch = next(iter(stream.read([spec], request, incarnation))).partitions[0]
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
