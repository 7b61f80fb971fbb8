"""What can be had without looking: one constant shape per prompt, the best on the train split."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
from jaxtyping import Bool, Float
from numpy.typing import NDArray

from radio.evaluation.prompts import Instance

Mask = Bool[NDArray[np.bool_], "h w"]
EXPONENTS = (1.5, 2.0, 2.5, 3.0, 4.0, 8.0, float("inf"))
SCALES = (0.8, 0.85, 0.9, 0.95, 1.0)
THRESHOLDS = (0.3, 0.35, 0.4, 0.45, 0.5, 0.55, 0.6)
RADII = tuple(round(0.02 * step, 2) for step in range(2, 41))
AVERAGE_SIDE = 64


@dataclass(frozen=True)
class Shape:
    """A named rule from an instance's prompt to a mask, which never looks at the picture."""

    name: str
    draw: Callable[[Instance], Mask]


def best_box_shape(train: Sequence[Instance]) -> Shape:
    """Return the superellipse, rectangle or cut average mask of the highest mean IoU."""
    average = average_mask(train)
    candidates = [
        Shape(_superellipse_name(power, scale), _superellipse(power, scale))
        for power, scale in product(EXPONENTS, SCALES)
    ]
    candidates += [
        Shape(f"average mask over {cut:g}", _cut_average(average, cut)) for cut in THRESHOLDS
    ]
    return _best(candidates, train)


def best_point_shape(train: Sequence[Instance]) -> Shape:
    """Return the disc round the point whose radius, a share of sqrt(h w), has the best mean IoU."""
    return _best(
        [Shape(f"disc, radius {radius:g} of sqrt(h w)", _disc(radius)) for radius in RADII], train
    )


def iou(first: Mask, second: Mask) -> float:
    """Return intersection over union; 0 for two empty masks."""
    union = int(np.count_nonzero(first | second))
    return int(np.count_nonzero(first & second)) / union if union else 0.0


def average_mask(instances: Sequence[Instance]) -> Float[NDArray[np.float64], "side side"]:
    """Return the mean over instances of the mask in its box, read at the nearest pixels."""
    total = np.zeros((AVERAGE_SIDE, AVERAGE_SIDE))
    places = (np.arange(AVERAGE_SIDE) + 0.5) / AVERAGE_SIDE
    for instance in instances:
        left, top, right, bottom = instance.box
        rows = top + (places * (bottom - top)).astype(int)
        columns = left + (places * (right - left)).astype(int)
        total += instance.mask[np.ix_(rows, columns)]
    return total / len(instances)


def _best(candidates: Sequence[Shape], train: Sequence[Instance]) -> Shape:
    scores = [
        sum(iou(shape.draw(instance), instance.mask) for instance in train) for shape in candidates
    ]
    return candidates[int(np.argmax(scores))]


def _superellipse_name(power: float, scale: float) -> str:
    kind = {2.0: "ellipse", float("inf"): "rectangle"}.get(power, f"superellipse {power:g}")
    return f"{kind}, {scale:g} of the box"


def _superellipse(power: float, scale: float) -> Callable[[Instance], Mask]:
    """Fill |x|^p + |y|^p <= 1 in the box's own units, scaled about its middle."""

    def draw(instance: Instance) -> Mask:
        across, down = (np.abs(axis) / scale for axis in _box_axes(instance))
        if power == float("inf"):
            inside = np.maximum(across[None], down[:, None]) <= 1
        else:
            inside = across[None] ** power + down[:, None] ** power <= 1
        return np.asarray(inside)

    return draw


def _cut_average(
    average: Float[NDArray[np.float64], "side side"], cut: float
) -> Callable[[Instance], Mask]:
    def draw(instance: Instance) -> Mask:
        left, top, right, bottom = instance.box
        columns = ((np.arange(right - left) + 0.5) / (right - left) * AVERAGE_SIDE).astype(int)
        rows = ((np.arange(bottom - top) + 0.5) / (bottom - top) * AVERAGE_SIDE).astype(int)
        drawn = np.zeros_like(instance.mask)
        drawn[top:bottom, left:right] = average[np.ix_(rows, columns)] > cut
        return drawn

    return draw


def _disc(share: float) -> Callable[[Instance], Mask]:
    def draw(instance: Instance) -> Mask:
        (height, width), (x, y) = instance.mask.shape, instance.point
        across, down = np.arange(width) - x, np.arange(height) - y
        return np.asarray(across[None] ** 2 + down[:, None] ** 2 <= share**2 * height * width)

    return draw


def _box_axes(instance: Instance) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the pixel centres' x and y in units in which the box is [-1, 1]."""
    (height, width), (left, top, right, bottom) = instance.mask.shape, instance.box
    across = (2 * np.arange(width) + 1 - left - right) / (right - left)
    down = (2 * np.arange(height) + 1 - top - bottom) / (bottom - top)
    return across, down
