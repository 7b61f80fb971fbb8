"""What is measured of a run: scores by metric, of plain numbers or of values of single pictures.

Below them what several findings measure: fidelity in the teachers' own spaces, kNN, segmentation.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.findings.declare import HIGH, LOW
from benchmarks.findings.trained import Trained
from radio.encoder.images import resized
from radio.evaluation import mode_switch
from radio.evaluation.features import features_of
from radio.evaluation.knn import knn
from radio.evaluation.pictures import Split
from radio.evaluation.result import Options, Statistic, mean, weighted
from radio.evaluation.segmentation import mean_iou, segmentation
from radio.evaluation.target_kinds import TeacherTarget
from radio.targets.grid import to_coarser
from radio.training.metrics import Fidelity

BATCH = 16
Maps = Float[Tensor, "n d _ _"]


def variance_ratio(rows: NDArray[Any]) -> float:
    """Return sum (y - mean y)^2 / sum (p - y)^2 of [pictures, 2]."""
    spread, residual = rows.sum(axis=0)
    return float(spread / residual)


def explained(rows: NDArray[Any]) -> float:
    """Return e = 1 - 1 / fidelity of [pictures, 2]."""
    return float(mode_switch.explained(rows))


def evenness(rows: NDArray[Any]) -> float:
    """Return min e / max e over sizes of [pictures, sizes, 2]."""
    return mode_switch.worst_ratio(rows[:, None])


STATISTICS: dict[str, Statistic] = {
    "mean": mean,
    "fidelity": variance_ratio,
    "explained": explained,
    "evenness": evenness,
    "mean_iou": mean_iou,
}


@dataclass(frozen=True)
class Samples:
    """Rows [pictures, ...] and the name of their statistic."""

    rows: NDArray[Any]
    statistic: str = "mean"

    def score(self, weights: NDArray[np.float64] | None = None) -> float:
        """Return the statistic of the rows, as they are or weighted by picture."""
        rows = self.rows if weights is None else weighted(self.rows, weights)
        return STATISTICS[self.statistic](rows)

    def as_dict(self) -> dict[str, Any]:
        """Return what goes into JSON, seven digits of a value."""
        rows = self.rows
        if not np.issubdtype(rows.dtype, np.integer):
            rows = np.vectorize(lambda value: float(f"{value:.7g}"))(rows)
        return {"statistic": self.statistic, "rows": rows.tolist()}

    @classmethod
    def of(cls, said: Mapping[str, Any]) -> Samples:
        """Read back what `as_dict` wrote."""
        return cls(np.asarray(said["rows"]), said["statistic"])


Scores = dict[str, float | Samples]  # what is measured of a run, by metric


def batches_of(split: Split, size: int) -> Iterator[tuple[slice, Tensor]]:
    """Yield uint8 pictures of size x size, and where they stand in the split."""
    for start in range(0, len(split), BATCH):
        part = slice(start, min(start + BATCH, len(split)))
        pictures = [resized(split.picture(at), 1, size) for at in range(part.start, part.stop)]
        yield part, torch.stack(pictures)


def fidelity(trained: Trained, sizes: Sequence[int] = (LOW, HIGH)) -> Scores:
    """Measure every teacher's held-out fidelity and MSE at sizes of the student, in its own space.

    Fidelity is sum (y - mean y)^2 / sum (p - y)^2 of unstandardized features; `mse` is
    sum (p - y)^2 over positions and channels. Teachers see pictures as the task mode-switch shows
    them, however a run showed it the views.
    """
    split = trained.material.pictures.split("val")
    outputs = {name: f"{name}:features" for name in trained.teachers}
    scores = Scores()
    for size in sizes:
        maps = {
            name: told_at(trained, teacher, split, size)
            for name, teacher in trained.teachers.items()
        }
        sums = {name: Fidelity() for name in maps}
        for part, pictures in batches_of(split, size):
            said = trained.target.extract(pictures, list(outputs.values()))
            for name, output in outputs.items():
                predicted = said[output] / trained.factors.get(name, 1.0)
                sums[name].update(*to_coarser(predicted, maps[name][part]))
        for name, several in sums.items():
            rows = several.by_view()
            values = float(torch.cat(several.counts).sum()) * maps[name].shape[1]
            scores[f"mse/{name}@{size}"] = float(rows[:, 1].sum()) / values
            scores[f"fidelity/{name}@{size}"] = Samples(rows.numpy(), "fidelity")
    return scores


def told_at(trained: Trained, teacher: TeacherTarget, split: Split, size: int) -> Maps:
    """Return what a teacher says of pictures that the student sees at `size`.

    As many strides as the student has patches where it takes any size; full canvases for SAM below
    its own; the native size else.
    """
    side = size // trained.target.patch
    mode = mode_switch.mode_at(teacher.teacher, (side, side))
    if mode != "mosaic":
        shown = side * teacher.patch if mode == "match" else teacher.native_size
        return features_of(teacher, split, "features", shown)
    starts = range(0, len(split), BATCH)
    parts = (range(start, min(start + BATCH, len(split))) for start in starts)
    return torch.cat([mode_switch.matched(teacher, (side, side), split, part) for part in parts])


def neighbours(trained: Trained) -> Scores:
    """Measure top 1 of the 20 nearest neighbours of the backbone's summary, 100 classes, 128 px."""
    result = knn(trained.target, trained.material.classes, Options(size=LOW))
    return {"knn": Samples(result.samples.astype(int))}


def streets(trained: Trained) -> Scores:
    """Measure mIoU of a linear probe of the backbone's features on streets, at 256 px."""
    result = segmentation(trained.target, trained.material.streets, Options(size=HIGH))
    return {"miou": Samples(result.samples, "mean_iou")}
