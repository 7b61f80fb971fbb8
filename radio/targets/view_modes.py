"""How a teacher is shown a partition's views, one function per mode.

A mode says at which side in px the views are read for a teacher, and how the teacher's features of
each view come out of its forward passes. Whatever is put together for a pass (canvas, tiles) is
taken apart again here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from radio.data.mosaic import Mosaic
from radio.data.plan import PartitionSpec
from radio.targets.grid import Grid, larger
from teachers import Teacher, TeacherOutput

Pixels = Float[Tensor, "b 3 height width"]
Forward = Callable[[Pixels], TeacherOutput]
Upsampler = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Shown:
    """What a mode works on: a teacher, its batched forward, a partition, the student's grid.

    `grid` is (rows, columns) of what the student's adaptor for this teacher predicts.
    """

    teacher: Teacher
    forward: Forward
    partition: PartitionSpec
    grid: Grid
    upsampler: Upsampler | None = None

    @property
    def tiles(self) -> int:
        """Native tiles along a side that cover at least the student's pixels."""
        return -(-max(self.partition.pixels) // self.teacher.native_size)


@dataclass(frozen=True)
class ViewMode:
    """`size` (height, width) at which views are read, `run` from normalised views to features."""

    size: Callable[[Shown], tuple[int, int]]
    run: Callable[[Shown, Pixels], TeacherOutput]


def _native(shown: Shown) -> tuple[int, int]:
    return shown.teacher.native_size, shown.teacher.native_size


def _match(shown: Shown) -> tuple[int, int]:
    (rows, columns), stride = shown.grid, shown.teacher.stride
    return rows * stride, columns * stride


def _student_pixels(shown: Shown) -> tuple[int, int]:
    return shown.partition.pixels


def _tiles(shown: Shown) -> tuple[int, int]:
    side = shown.tiles * shown.teacher.native_size
    return side, side


def _alone(shown: Shown, pixels: Pixels) -> TeacherOutput:
    """A view is an image of the teacher's."""
    return shown.forward(pixels)


def _mosaic(shown: Shown, pixels: Pixels) -> TeacherOutput:
    """k x k views share a canvas, in the step's own order; no summary (RADIOv2.5, 2412.07679)."""
    teacher, order = shown.teacher, list(shown.partition.order)
    mosaic = Mosaic(teacher.native_size, shown.partition.image_size, teacher.stride)
    output = shown.forward(mosaic.place(pixels[order]))
    windows = mosaic.split(output.features, len(pixels))
    features = torch.empty_like(windows)
    features[order] = windows
    return TeacherOutput(None, features)


def _padded(shown: Shown, pixels: Pixels) -> TeacherOutput:
    """A view lies alone at the top left of a canvas, zero around it (PHI-S, 2410.01680, A.7)."""
    teacher = shown.teacher
    mosaic = Mosaic(teacher.native_size, shown.partition.image_size, teacher.stride, per_side=1)
    output = shown.forward(mosaic.place(pixels))
    return TeacherOutput(output.summary, mosaic.split(output.features, len(pixels)))


def _tiled(shown: Shown, pixels: Pixels) -> TeacherOutput:
    """k x k native tiles of a view, their features side by side; no summary sees the whole view.

    What a fixed-size teacher is made to do at high resolution; it loses the global context and the
    scale equivariance (RADIOv2.5, finding 1).
    """
    k = shown.tiles
    b, c, height, width = pixels.shape
    cut = pixels.reshape(b, c, k, height // k, k, width // k).permute(0, 2, 4, 1, 3, 5)
    features = shown.forward(cut.flatten(0, 2)).features
    d, h, w = features.shape[1:]
    joined = features.reshape(b, k, k, d, h, w).permute(0, 3, 1, 4, 2, 5)
    return TeacherOutput(None, joined.reshape(b, d, k * h, k * w))


def _sharpened(shown: Shown, pixels: Pixels) -> TeacherOutput:
    """Native features made finer: by an upsampler's file, or bicubic to the student's grid.

    FeatSharp (2502.16025) trains such upsamplers, and has the bicubic as its baseline.
    """
    output = shown.forward(pixels)
    features = output.features.float()
    if shown.upsampler is not None:
        return TeacherOutput(output.summary, shown.upsampler(features, pixels))
    grid = larger(shown.grid, (features.shape[-2], features.shape[-1]))
    return TeacherOutput(output.summary, F.interpolate(features, size=grid, mode="bicubic"))


VIEW_MODES: dict[str, ViewMode] = {
    "native": ViewMode(_native, _alone),
    "match": ViewMode(_match, _alone),
    "mosaic": ViewMode(_student_pixels, _mosaic),
    "padded": ViewMode(_student_pixels, _padded),
    "tiled": ViewMode(_tiles, _tiled),
    "sharpened": ViewMode(_native, _sharpened),
}
