"""How a teacher is shown a partition's views, one function per mode.

A mode says at which side in px the views are read for a teacher, and how the teacher's features of
each view come out of its forward passes. Whatever is put together for a pass (canvas, tiles) is
taken apart again here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from radio.data.mosaic import Mosaic
from radio.data.plan import PartitionSpec
from radio.targets.grid import Grid, larger
from teachers import TeacherOutput

Pixels = Float[Tensor, "b 3 height width"]
Forward = Callable[[Pixels], TeacherOutput]
Upsampler = Callable[[Tensor, Tensor], Tensor]


@runtime_checkable
class Sized(Protocol):
    """What decides a view's size: a teacher, or its card where the teacher itself is elsewhere."""

    @property
    def stride(self) -> int:
        """Pixels of a position's side."""

    @property
    def native_size(self) -> int:
        """Pixels of the teacher's own square."""


@dataclass(frozen=True)
class Sight:
    """A teacher in front of a partition.

    `grid` is (rows, columns) of what the student's adaptor for this teacher predicts.
    """

    teacher: Sized
    partition: PartitionSpec
    grid: Grid

    @property
    def tiles(self) -> int:
        """Native tiles along a side that cover at least the student's pixels."""
        return -(-max(self.partition.pixels) // self.teacher.native_size)


@dataclass(frozen=True)
class Shown(Sight):
    """A sight that is run: with the teacher's batched forward, and an upsampler's file if any."""

    forward: Forward
    upsampler: Upsampler | None = None


@dataclass(frozen=True)
class ViewMode:
    """`size` (height, width) at which views are read, `run` from normalised views to features."""

    size: Callable[[Sight], tuple[int, int]]
    run: Callable[[Shown, Pixels], TeacherOutput]


def _native(sight: Sight) -> tuple[int, int]:
    """The teacher's own square.

    Recipe: teacher at its own size; AM-RADIO (2312.06709); stages[].partitions.*.views.*=native;
    tests/test_recipe.py::test_native_and_match_read_views_at_the_promised_size.
    """
    return sight.teacher.native_size, sight.teacher.native_size


def _match(sight: Sight) -> tuple[int, int]:
    """As many of the teacher's strides as the student has positions.

    Recipe: teacher at the size whose grid is the student's; RADIOv2.5 (2412.07679);
    stages[].partitions.*.views.*=match;
    tests/test_recipe.py::test_native_and_match_read_views_at_the_promised_size.
    """
    (rows, columns), stride = sight.grid, sight.teacher.stride
    return rows * stride, columns * stride


def _tiles(sight: Sight) -> tuple[int, int]:
    side = sight.tiles * sight.teacher.native_size
    return side, side


def _alone(shown: Shown, pixels: Pixels) -> TeacherOutput:
    """A view is an image of the teacher's."""
    return shown.forward(pixels)


def _mosaic(shown: Shown, pixels: Pixels) -> TeacherOutput:
    """k x k views share a canvas, in the step's own order; no summary (RADIOv2.5, 2412.07679).

    Recipe: mosaic of k x k views; RADIOv2.5 (2412.07679); stages[].partitions.*.views.*=mosaic;
    tests/test_view_modes.py::test_the_order_on_canvases_decides_the_neighbours_and_nothing_else.
    """
    teacher, order = shown.teacher, list(shown.partition.order)
    mosaic = Mosaic(teacher.native_size, _match(shown)[0], teacher.stride)
    output = shown.forward(mosaic.place(pixels[order]))
    windows = mosaic.split(output.features, len(pixels))
    features = torch.empty_like(windows)
    features[order] = windows
    return TeacherOutput(None, features)


def _padded(shown: Shown, pixels: Pixels) -> TeacherOutput:
    """A view lies alone at the top left of a canvas, zero around it (PHI-S, 2410.01680, A.7).

    Recipe: padded view, its features cropped; PHI-S (2410.01680) section A.7;
    stages[].partitions.*.views.*=padded;
    tests/test_view_modes.py::test_a_padded_view_lies_alone_on_its_canvas.
    """
    teacher = shown.teacher
    mosaic = Mosaic(teacher.native_size, _match(shown)[0], teacher.stride, per_side=1)
    output = shown.forward(mosaic.place(pixels))
    return TeacherOutput(output.summary, mosaic.split(output.features, len(pixels)))


def _tiled(shown: Shown, pixels: Pixels) -> TeacherOutput:
    """k x k native tiles of a view, their features side by side; no summary sees the whole view.

    What a fixed-size teacher is made to do at high resolution; it loses the global context and the
    scale equivariance (RADIOv2.5, finding 1).

    Recipe: tiles of a view, the rival of high resolution; RADIOv2.5 (2412.07679);
    stages[].partitions.*.views.*=tiled;
    tests/test_view_modes.py::test_tiles_are_native_pictures_laid_side_by_side.
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

    Recipe: upsampled features; FeatSharp (2502.16025); stages[].partitions.*.views.*=sharpened,
    teachers.*.upsampler; tests/test_view_modes.py::test_sharpened_features_reach_the_students_grid.
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
    "mosaic": ViewMode(_match, _mosaic),
    "padded": ViewMode(_match, _padded),
    "tiled": ViewMode(_tiles, _tiled),
    "sharpened": ViewMode(_native, _sharpened),
}
