"""What several findings measure: fidelity in the teachers' own spaces, kNN, segmentation."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from benchmarks.findings.declare import HIGH, LOW, Measured
from benchmarks.findings.samples import Samples
from benchmarks.findings.trained import Trained
from radio.encoder.images import resized
from radio.evaluation.features import features_of
from radio.evaluation.knn import knn
from radio.evaluation.mode_switch import Explained
from radio.evaluation.pictures import Split
from radio.evaluation.result import Options
from radio.evaluation.segmentation import segmentation
from radio.evaluation.target import Target

BATCH = 16


def batches_of(split: Split, size: int) -> Iterator[tuple[slice, Tensor]]:
    """Yield uint8 pictures of size x size, and where they stand in the split."""
    for start in range(0, len(split), BATCH):
        part = slice(start, min(start + BATCH, len(split)))
        pictures = [resized(split.picture(at), 1, size) for at in range(part.start, part.stop)]
        yield part, torch.stack(pictures)


def fidelity(trained: Trained, sizes: Sequence[int] = (LOW, HIGH)) -> Measured:
    """Measure every teacher's held-out fidelity and MSE at sizes of the student, in its own space.

    Fidelity is sum (y - mean y)^2 / sum (p - y)^2 of unstandardized features; `mse` is
    sum (p - y)^2 over positions and channels. A teacher of one size sees each picture at that size,
    whatever the student's, so that the targets are the same however a run showed it the views; one
    that takes any sees as many strides as the student has patches.
    """
    split = trained.material.pictures.split("val")
    outputs = {name: f"{name}:features" for name in trained.teachers}
    scores, samples = dict[str, float](), dict[str, Samples]()
    for size in sizes:
        maps = {
            name: features_of(teacher, split, "features", shown_at(trained, teacher, size))
            for name, teacher in trained.teachers.items()
        }
        sums = {name: Explained() for name in maps}
        for part, pictures in batches_of(split, size):
            said = trained.target.extract(pictures, list(outputs.values()))
            for name, output in outputs.items():
                sums[name].update(said[output] / trained.factors.get(name, 1.0), maps[name][part])
        for name, several in sums.items():
            rows = several.by_picture()
            values = float(torch.cat(several.counts).sum()) * maps[name].shape[1]
            scores[f"mse/{name}@{size}"] = float(rows[:, 1].sum()) / values
            samples[f"fidelity/{name}@{size}"] = Samples(rows.numpy(), "fidelity")
    return Measured(scores, samples)


def shown_at(trained: Trained, teacher: Target, size: int) -> int:
    """Return the side at which a teacher sees what the student sees at `size`."""
    if not teacher.takes_any_size:
        return teacher.native_size
    return size // trained.target.patch * teacher.patch


def neighbours(trained: Trained) -> Measured:
    """Measure top 1 of the 20 nearest neighbours of the backbone's summary, 100 classes, 128 px."""
    result = knn(trained.target, trained.material.classes, Options(size=LOW))
    return Measured(samples={"knn": Samples(result.samples.astype(int))})


def streets(trained: Trained) -> Measured:
    """Measure mIoU of a linear probe of the backbone's features on streets, at 256 px."""
    result = segmentation(trained.target, trained.material.streets, Options(size=HIGH))
    return Measured(samples={"miou": Samples(result.samples, "mean_iou")})


def together(parts: Iterable[Measured]) -> Measured:
    """Return several measurements as one."""
    scores, samples = dict[str, float](), dict[str, Samples]()
    for part in parts:
        scores.update(part.scores)
        samples.update(part.samples)
    return Measured(scores, samples)
