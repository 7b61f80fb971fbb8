"""Image to view: one crop, keyed by (seed, epoch, position), at any size that is asked for."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor

from radio.data.decode import DamagedImage, decode
from radio.data.plan import PartitionSpec, ViewSpec, seed_for
from radio.data.shards import ImageSource, place_of
from radio.errors import RadioError
from radio.files import printable

log = logging.getLogger("radio.data")
CACHE_BYTES = 256 << 20  # the same picture is asked for at several sizes in one step
BYTES_PER_PIXEL = 4  # Pillow keeps RGB in four bytes
REDRAWS = 20
CROP_TRIES = 10
IO_TRIES = 3
IO_PAUSE_SECONDS = 0.2  # before the second try; each further one waits twice as long


@dataclass(frozen=True)
class Crop:
    """A box (left, top, right, bottom) in pixels of the image, and whether to mirror it."""

    box: tuple[float, float, float, float]
    flip: bool


@dataclass(frozen=True)
class Framing:
    """What a reader sees of its crops: which part, and how wide over high they are cut.

    A crop covers `margin` patches more than the `grid` (rows, columns) of a view, in both
    directions; a reader takes its grid at an offset of its own, drawn by its name (C-RADIOv4).
    """

    reader: str = "student"
    aspect: float = 1.0
    grid: tuple[int, int] = (1, 1)
    margin: int = 0

    @classmethod
    def of(cls, partition: PartitionSpec, patch_size: int, reader: str) -> Framing:
        """Return how `reader` sees a partition's crops."""
        height, width = partition.pixels
        grid = height // patch_size, width // patch_size
        return cls(reader, width / height, grid, partition.margin)


WHOLE = Framing()


def random_crop(
    width: int,
    height: int,
    seed: int,
    scale: tuple[float, float] = (0.4, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> Crop:
    """Draw a box by the rule of torchvision's RandomResizedCrop, in whole pixels.

    A share `scale` of the area and a log-uniform aspect `ratio`; where ten tries do not fit, the
    largest centred box within the ratio. Mirrored with probability 1/2. Only uniforms of PCG64 are
    drawn and boxes are rounded, so the result is the same on every machine.

    Recipe: random scale and crop; AM-RADIO (2312.06709); data.crop_scale;
    tests/test_views.py::test_crops_are_distributed_like_torchvisions.
    """
    rng = np.random.Generator(np.random.PCG64(seed))
    flip = bool(rng.random() < 0.5)
    log_low, log_high = math.log(ratio[0]), math.log(ratio[1])
    for _ in range(CROP_TRIES):
        area = width * height * (scale[0] + (scale[1] - scale[0]) * rng.random())
        aspect = math.exp(log_low + (log_high - log_low) * rng.random())
        w, h = max(1, round(math.sqrt(area * aspect))), max(1, round(math.sqrt(area / aspect)))
        at_x, at_y = rng.random(), rng.random()
        if w <= width and h <= height:
            left, top = math.floor(at_x * (width - w + 1)), math.floor(at_y * (height - h + 1))
            return _crop_at(left, top, w, h, flip)
    w = max(1, min(width, round(height * ratio[1])))
    h = max(1, min(height, round(width / ratio[0])))
    left, top = (width - w) // 2, (height - h) // 2
    return _crop_at(left, top, w, h, flip)


def part_of(crop: Crop, offset: tuple[int, int], framing: Framing) -> Crop:
    """Return the grid's part of a crop that is a margin larger, `offset` patches down and right.

    Right is said of the view, so a mirrored crop counts from its other side.

    Recipe: crops whole patches apart; C-RADIOv4 (2601.17237); data.shift_margin;
    tests/test_shifts.py::test_readers_see_parts_of_one_crop_whole_patches_apart.
    """
    left, top, right, bottom = crop.box
    (rows, columns), margin = framing.grid, framing.margin
    down, along = offset
    along = margin - along if crop.flip else along
    width, height = (right - left) / (columns + margin), (bottom - top) / (rows + margin)
    x, y = left + along * width, top + down * height
    # The product may round to beyond the picture, which Pillow refuses.
    box = x, y, min(x + columns * width, right), min(y + rows * height, bottom)
    return Crop(box, crop.flip)


def centre_square(width: int, height: int) -> Crop:
    """Return the largest centred square."""
    side = min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    return _crop_at(left, top, side, side, False)


def _crop_at(left: int | float, top: int | float, width: int, height: int, flip: bool) -> Crop:
    return Crop((float(left), float(top), float(left + width), float(top + height)), flip)


def crop_view(
    image: Image.Image, crop: Crop, size: int | tuple[int, int]
) -> UInt8[Tensor, "3 h w"]:
    """Cut and resize in one antialiased bicubic pass to `size` (side, or (height, width))."""
    height, width = (size, size) if isinstance(size, int) else size
    view = image.resize((width, height), Image.Resampling.BICUBIC, box=crop.box)
    pixels = np.asarray(view)
    if crop.flip:
        pixels = pixels[:, ::-1]
    return torch.from_numpy(pixels.transpose(2, 0, 1).copy())


@dataclass(frozen=True)
class Views:
    """A batch of views, the keys of the pictures used, and (damaged key, reason) of redraws.

    `offsets` are (down, right) in patches of each view in its crop, None without a margin.
    """

    pixels: UInt8[Tensor, "b 3 h w"]
    keys: tuple[str, ...]
    replaced: tuple[tuple[str, str], ...] = ()
    offsets: tuple[tuple[int, int], ...] | None = None


class ViewReader:
    """Read views of a source; the same spec gives the same pixels in any process or thread.

    A damaged picture is replaced by the k-th redraw keyed (seed, epoch, position, k), so that no
    other view moves. `damaged` maps the key of each one met so far to the reason. Decoded
    pictures are kept up to CACHE_BYTES, and left behind when the reader is pickled.

    Args:
        source: where the pictures lie.
        seed: the run's seed.
        crop_scale: shares of the area that crops have; None: the whole picture's centred square.
    """

    def __init__(
        self, source: ImageSource, seed: int, crop_scale: tuple[float, float] | None
    ) -> None:
        self.source = source
        self.seed = seed
        self.crop_scale = crop_scale
        self.damaged: dict[str, str] = {}
        self._cache = _PictureCache(CACHE_BYTES)

    def batch(
        self, views: Sequence[ViewSpec], size: int | tuple[int, int], framing: Framing = WHOLE
    ) -> Views:
        """Return the views at `size` pixels (side, or (height, width)), with their keys.

        Raises:
            RadioError: a picture and its 20 redraws were all damaged.
            OSError: the storage failed three times.
        """
        height, width = (size, size) if isinstance(size, int) else size
        pixels = torch.empty((len(views), 3, height, width), dtype=torch.uint8)
        keys, replaced = [], list[tuple[str, str]]()
        for row, view in enumerate(views):
            sample, image = self._image(view, replaced)
            pixels[row] = crop_view(image, self.crop(view, *image.size, framing), size)
            keys.append(self.source.key(sample))
        offsets = tuple(self.offset(view, framing) for view in views) if framing.margin else None
        return Views(pixels, tuple(keys), tuple(replaced), offsets)

    def crop(self, view: ViewSpec, width: int, height: int, framing: Framing = WHOLE) -> Crop:
        """Return what a reader sees of a view in a picture of this size, at any target size."""
        if self.crop_scale is None:
            return centre_square(width, height)
        seed = seed_for(self.seed, "crop", view.epoch, view.position)
        ratio = 3 / 4 * framing.aspect, 4 / 3 * framing.aspect
        crop = random_crop(width, height, seed, self.crop_scale, ratio)
        if not framing.margin:
            return crop
        return part_of(crop, self.offset(view, framing), framing)

    def offset(self, view: ViewSpec, framing: Framing) -> tuple[int, int]:
        """Draw (down, right) in patches, each uniform in [0, margin], by the reader's name."""
        seed = seed_for(self.seed, f"shift/{framing.reader}", view.epoch, view.position)
        down, right = divmod(seed % (framing.margin + 1) ** 2, framing.margin + 1)
        return down, right

    def _image(self, view: ViewSpec, replaced: list[tuple[str, str]]) -> tuple[int, Image.Image]:
        sample, tried = view.sample, list[str]()
        for redraw in range(1, REDRAWS + 2):
            try:
                return sample, self._decoded(sample)
            except DamagedImage as error:
                key = self.source.key(sample)
                self._note(sample, key, str(error))
                replaced.append((key, str(error)))
                tried.append(key)
            seed = seed_for(self.seed, "redraw", view.epoch, view.position, redraw)
            sample = seed % len(self.source)
        raise RadioError(
            f"the picture '{tried[0]}' and its {REDRAWS} redraws are all damaged "
            f"({', '.join(dict.fromkeys(tried))}; the first: {self.damaged[tried[0]]}); check the "
            "data"
        )

    def _decoded(self, sample: int) -> Image.Image:
        image = self._cache.get(sample)
        if image is None:
            known = self.damaged.get(self.source.key(sample))
            if known is not None:
                raise DamagedImage(known)
            image = decode(read_patiently(self.source, sample))
            self._cache.put(sample, image)
        return image

    def _note(self, sample: int, key: str, reason: str) -> None:
        if key not in self.damaged:
            self.damaged[key] = reason
            where = printable(place_of(self.source, sample))
            log.warning("damaged picture '%s' (%s) is replaced: %s", printable(key), where, reason)


class _PictureCache:
    """The pictures last used, up to a number of bytes; pickles as an empty one."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self._held: OrderedDict[int, Image.Image] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._held)

    def get(self, sample: int) -> Image.Image | None:
        with self._lock:
            image = self._held.get(sample)
            if image is not None:
                self._held.move_to_end(sample)
            return image

    def put(self, sample: int, image: Image.Image) -> None:
        with self._lock:
            if sample in self._held:  # another thread was faster
                return
            self._held[sample] = image
            self.num_bytes += _num_bytes(image)
            while self.num_bytes > self.max_bytes:
                _, oldest = self._held.popitem(last=False)
                self.num_bytes -= _num_bytes(oldest)

    def __getstate__(self) -> dict[str, Any]:
        return {"max_bytes": self.max_bytes}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["max_bytes"])  # type: ignore[misc]


def _num_bytes(image: Image.Image) -> int:
    return image.width * image.height * BYTES_PER_PIXEL


def read_patiently(source: ImageSource, sample: int) -> bytes:
    """Read a sample's bytes, trying a failing storage again with growing pauses.

    Raises:
        OSError: the storage failed three times; never taken for a damaged picture.
    """
    for attempt in range(1, IO_TRIES):
        try:
            return source.read(sample)
        except OSError as error:
            pause = IO_PAUSE_SECONDS * 2 ** (attempt - 1)
            key = source.key(sample)
            log.warning("reading '%s' failed (%s); again in %.1f s", key, error, pause)
            time.sleep(pause)
    return source.read(sample)
