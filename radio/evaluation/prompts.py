"""What a promptable model is asked: instances of a picture, a point in each, a box round each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, UInt8
from numpy.typing import NDArray

from radio.errors import RadioError

SMALLEST_SHARE = 0.01  # of the picture's area


@dataclass(frozen=True)
class Instance:
    """One object of a picture: its mask and the two prompts for it.

    `point` is (x, y), the index of a pixel; `box` is (x, y, x, y), the outer edges. Both in the
    picture's own pixels.
    """

    mask: Bool[NDArray[np.bool_], "h w"]
    point: tuple[int, int]
    box: tuple[int, int, int, int]

    @property
    def share(self) -> float:
        """Return the mask's part of the picture's area."""
        return float(self.mask.mean())


def instances_of(
    labels: UInt8[NDArray[np.uint8], "h w"],
    listed: Sequence[dict[str, Any]],
    smallest: float = SMALLEST_SHARE,
) -> list[Instance]:
    """Return the instances of a map (0 is none) that are no crowd and not below `smallest`.

    Raises:
        RadioError: an instance has no id, or one that a map of 8 bits cannot hold.
    """
    found = []
    for entry in listed:
        number = entry.get("id")
        if not isinstance(number, int) or not 1 <= number <= 255:
            raise RadioError(
                f"an instance has the id {number!r}; expected the value that its pixels have in "
                "the instance map, 1 to 255: mend the picture's json"
            )
        mask = labels == number
        if not entry.get("iscrowd", 0) and mask.any() and mask.mean() >= smallest:
            found.append(Instance(mask, inner_point(mask), bounding_box(mask)))
    return found


def bounding_box(mask: Bool[NDArray[np.bool_], "h w"]) -> tuple[int, int, int, int]:
    """Return (x, y, x, y) of the mask's outer edges in pixels; the mask must not be empty."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def inner_point(mask: Bool[NDArray[np.bool_], "h w"]) -> tuple[int, int]:
    """Return (x, y) of the pixel farthest from the mask's border, the first in reading order."""
    left, top, right, bottom = bounding_box(mask)
    distance = distance_to_border(mask[top:bottom, left:right])
    row, column = np.unravel_index(int(distance.argmax()), distance.shape)
    return left + int(column), top + int(row)


def distance_to_border(
    mask: Bool[NDArray[np.bool_], "h w"],
) -> Float[NDArray[np.float64], "h w"]:
    """Return each pixel's distance (px) to the nearest one outside the mask or the picture.

    Exact and separable (Felzenszwalb and Huttenlocher 2012, eq. 2): down the columns, then along
    each row. scipy has the same as `distance_transform_edt`, but is not needed otherwise.
    """
    padded = np.pad(mask, 1)
    rows = np.arange(padded.shape[0])[:, None]
    above = np.maximum.accumulate(np.where(padded, -1, rows), axis=0)
    below = np.minimum.accumulate(np.where(padded, len(padded), rows)[::-1], axis=0)[::-1]
    vertical = np.minimum(rows - above, below - rows).astype(np.int64) ** 2
    columns = np.arange(padded.shape[1])
    across = (columns[:, None] - columns[None]) ** 2
    squared = np.stack([(across + row).min(axis=1) for row in vertical])
    return np.asarray(np.sqrt(squared[1:-1, 1:-1]))


def to_square(
    places: Float[NDArray[np.float64], "n 2"] | Float[NDArray[np.float64], "n 4"],
    picture: tuple[int, int],
    size: int,
) -> Float[NDArray[np.float32], "n _"]:
    """Scale (x, y, ...) from a picture of (height, width) px to the square it is squashed to.

    As segment_anything's ResizeLongestSide.apply_coords does, but each side by its own factor.
    """
    height, width = picture
    factors = np.array([size / width, size / height] * (places.shape[1] // 2))
    return np.asarray(places * factors, dtype=np.float32)
