"""Image to view: one crop, keyed by (seed, epoch, position), at any size that is asked for."""

from __future__ import annotations

import logging
import math
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor

from radio.data.decode import DamagedImage, decode
from radio.data.plan import ViewSpec, seed_for
from radio.data.shards import ImageSource
from radio.errors import RadioError

log = logging.getLogger("radio.data")
CACHE_BYTES = 256 << 20  # the same picture is asked for at several sizes in one step
REDRAWS = 20
IO_TRIES = 3


@dataclass(frozen=True)
class Crop:
    """A box (left, top, right, bottom) in pixels of the image, and whether to mirror it."""

    box: tuple[float, float, float, float]
    flip: bool


def random_crop(
    width: int,
    height: int,
    seed: int,
    scale: tuple[float, float] = (0.4, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> Crop:
    """Draw a box: a share `scale` of the area, a log-uniform aspect `ratio` (Inception's rule).

    Ten tries, then the largest centred box within the ratio; mirrored with probability 1/2.
    """
    rng = np.random.Generator(np.random.PCG64(seed))
    flip = bool(rng.random() < 0.5)
    for _ in range(10):
        area = width * height * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        w, h = math.sqrt(area * aspect), math.sqrt(area / aspect)
        left, top = rng.random() * (width - w), rng.random() * (height - h)
        if w <= width and h <= height:
            return Crop((left, top, left + w, top + h), flip)
    w = min(width, height * ratio[1])
    h = min(height, width / ratio[0])
    left, top = (width - w) / 2, (height - h) / 2
    return Crop((left, top, left + w, top + h), flip)


def centre_square(width: int, height: int) -> Crop:
    """Return the largest centred square."""
    side = min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    return Crop((left, top, left + side, top + side), False)


def crop_view(
    image: Image.Image, crop: Crop, size: int | tuple[int, int]
) -> UInt8[Tensor, "3 h w"]:
    """Cut and resize in one antialiased bicubic pass to `size` (side, or (height, width))."""
    height, width = (size, size) if isinstance(size, int) else size
    view = image.resize((width, height), Image.Resampling.BICUBIC, box=crop.box)
    pixels = np.asarray(view)
    if crop.flip:
        pixels = pixels[:, ::-1]
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))


@dataclass(frozen=True)
class Views:
    """A batch of views, the keys of the pictures used, and (damaged key, reason) of redraws."""

    pixels: UInt8[Tensor, "b 3 h w"]
    keys: tuple[str, ...]
    replaced: tuple[tuple[str, str], ...] = ()


@dataclass
class ViewReader:
    """Read views of a source; the same spec gives the same pixels in any process.

    A damaged picture is replaced by the k-th redraw keyed (seed, epoch, position, k), so that no
    other view moves. Without `crop_scale` the whole picture's centred square is the view.
    """

    source: ImageSource
    seed: int
    crop_scale: tuple[float, float] | None
    damaged: dict[str, str] = field(default_factory=dict)
    _cache: OrderedDict[int, Image.Image] = field(default_factory=OrderedDict, repr=False)

    def batch(self, views: Sequence[ViewSpec], size: int | tuple[int, int]) -> Views:
        """Return the views at `size` pixels, with their keys.

        Raises:
            RadioError: 20 redraws in a row were damaged.
            OSError: the storage failed three times.
        """
        pixels, keys, replaced = [], [], list[tuple[str, str]]()
        for view in views:
            sample, image = self._image(view, replaced)
            pixels.append(crop_view(image, self._crop(view, image), size))
            keys.append(self.source.key(sample))
        return Views(torch.stack(pixels), tuple(keys), tuple(replaced))

    def _crop(self, view: ViewSpec, image: Image.Image) -> Crop:
        if self.crop_scale is None:
            return centre_square(*image.size)
        seed = seed_for(self.seed, "crop", view.epoch, view.position)
        return random_crop(*image.size, seed, self.crop_scale)

    def _image(self, view: ViewSpec, replaced: list[tuple[str, str]]) -> tuple[int, Image.Image]:
        sample = view.sample
        for redraw in range(1, REDRAWS + 2):
            try:
                return sample, self._decoded(sample)
            except DamagedImage as error:
                self._note(sample, str(error))
                replaced.append((self.source.key(sample), str(error)))
            key = seed_for(self.seed, "redraw", view.epoch, view.position, redraw)
            sample = key % len(self.source)
        keys = ", ".join(key for key, _ in replaced[-REDRAWS:])
        raise RadioError(f"{REDRAWS} pictures in a row are damaged ({keys}); check the data")

    def _decoded(self, sample: int) -> Image.Image:
        if sample in self._cache:
            self._cache.move_to_end(sample)
            return self._cache[sample]
        key = self.source.key(sample)
        if key in self.damaged:
            raise DamagedImage(self.damaged[key])
        image = decode(read_patiently(self.source, sample))
        self._cache[sample] = image
        while sum(held.width * held.height * 3 for held in self._cache.values()) > CACHE_BYTES:
            self._cache.popitem(last=False)
        return image

    def _note(self, sample: int, reason: str) -> None:
        key = self.source.key(sample)
        if key not in self.damaged:
            self.damaged[key] = reason
            log.warning("damaged picture %s replaced: %s", key, reason)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_cache": OrderedDict()}


def read_patiently(source: ImageSource, sample: int) -> bytes:
    """Read a sample's bytes, trying a failing storage again with growing pauses."""
    for attempt in range(1, IO_TRIES + 1):
        try:
            return source.read(sample)
        except OSError as error:
            if attempt == IO_TRIES:
                raise
            log.warning("reading %s failed (%s); trying again", source.key(sample), error)
            time.sleep(0.2 * 2**attempt)
    raise AssertionError("unreachable")
