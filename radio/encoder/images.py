"""What `encode` takes as pictures, made into batches of pixels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from PIL import Image, ImageOps
from torch import Tensor

from radio.data.decode import BROKEN, DamagedImage, decode, to_rgb
from radio.errors import RadioError
from student.vit import RANGE_TOLERANCE

Picture = Tensor | Image.Image | str | Path
Size = int | tuple[int, int]
Pixels = UInt8[Tensor, "*batch 3 h w"] | Float[Tensor, "*batch 3 h w"]


def pair(size: Size) -> tuple[int, int]:
    """Return (height, width) of a size given as a square's side or as a pair."""
    height, width = (size, size) if isinstance(size, int) else size
    return int(height), int(width)


def nearest_size(height: int, width: int, patch: int) -> tuple[int, int]:
    """Return the nearest (height, width) of whole patches, at least one each way."""
    return max(1, round(height / patch)) * patch, max(1, round(width / patch)) * patch


def check_size(height: int, width: int, patch: int) -> None:
    """Refuse a size that is no multiple of the patch, naming the nearest ones below and above."""
    if height >= patch and width >= patch and not height % patch and not width % patch:
        return
    low = [max(patch, side // patch * patch) for side in (height, width)]
    high = [max(patch, -(-side // patch) * patch) for side in (height, width)]
    nearest = dict.fromkeys(f"{rows} x {columns}" for rows, columns in (low, high))
    raise RadioError(
        f"{height} x {width} px is no multiple of the patch of {patch} px; nearest: "
        f"{' and '.join(nearest)}; pass size= to resize"
    )


def batches_of(
    images: Picture | Sequence[Picture], patch: int, size: Size | None, batch: int
) -> Iterator[Pixels]:
    """Yield [b, 3, H, W] of at most `batch` pictures; uint8, or float in [0, 1] as it was given.

    Raises:
        RadioError: no pictures, one that cannot be decoded, or of another size than the first.
    """
    if size is not None:
        check_size(*pair(size), patch)
    if batch < 1:
        raise RadioError(f"batch is {batch}; at least 1 picture goes through at once")
    if isinstance(images, Tensor) and images.ndim == 4:
        images = list(images)
    several = [images] if isinstance(images, Tensor | Image.Image | str | Path) else list(images)
    if not several:
        raise RadioError("no pictures were given")
    first: tuple[int, ...] | None = None
    for start in range(0, len(several), batch):
        pixels = [to_pixels(item, patch, size) for item in several[start : start + batch]]
        first = first or tuple(pixels[0].shape[-2:])
        for number, item in enumerate(pixels, start):
            if tuple(item.shape[-2:]) != first:
                raise RadioError(
                    f"picture {number} is {item.shape[-2]} x {item.shape[-1]} px after resizing "
                    f"but picture 0 is {first[0]} x {first[1]}; pass size=, or encode them one by "
                    "one"
                )
        if len({item.dtype for item in pixels}) > 1:
            pixels = [_unit(item) for item in pixels]
        yield torch.stack(pixels)


def to_pixels(image: Picture, patch: int, size: Size | None) -> Pixels:
    """Return one picture as [3, H, W] whose sides are multiples of the patch.

    Without `size` a tensor keeps its own, which must fit; files and PIL pictures go to the
    nearest that fits.
    """
    if isinstance(image, Tensor):
        return _tensor(image, patch, size)
    return resized(_open(image), patch, size)


def resized(image: Image.Image, patch: int, size: Size | None) -> UInt8[Tensor, "3 h w"]:
    """Resize an upright RGB picture to `size`, or to the nearest that fits.

    One antialiased bicubic pass, as the views of training are made.
    """
    height, width = nearest_size(image.height, image.width, patch) if size is None else pair(size)
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1).contiguous()


def _tensor(image: Tensor, patch: int, size: Size | None) -> Pixels:
    if image.ndim != 3 or image.shape[0] != 3:
        raise RadioError(
            f"a tensor of shape {list(image.shape)} is no picture; expected [3, H, W] or "
            "[B, 3, H, W]"
        )
    if image.dtype != torch.uint8 and not image.is_floating_point():
        raise RadioError(f"a picture of {image.dtype}; expected uint8, or floats in [0, 1]")
    _check_range(image)
    height, width = (int(side) for side in image.shape[-2:])
    if size is None:
        check_size(height, width, patch)
        return image
    if pair(size) == (height, width):
        return image
    scaled = F.interpolate(
        _unit(image)[None], size=pair(size), mode="bicubic", antialias=True, align_corners=False
    )
    return scaled[0].clamp(0, 1)


def _check_range(pixels: Tensor) -> None:
    """Refuse floats outside [0, 1], before a resize would clip them.

    On the CPU only, as the backbone does: elsewhere a look at the values stops the queue.
    """
    if not pixels.is_floating_point() or pixels.device.type != "cpu" or not pixels.numel():
        return
    low, high = (float(bound) for bound in pixels.detach().aminmax())
    if not (low >= -RANGE_TOLERANCE and high <= 1 + RANGE_TOLERANCE):
        raise RadioError(f"the pixels lie in [{low:.3g}, {high:.3g}]; expected uint8 or [0, 1]")


def _unit(pixels: Tensor) -> Tensor:
    return pixels.float() / 255 if pixels.dtype == torch.uint8 else pixels.float()


def _open(image: Image.Image | str | Path) -> Image.Image:
    if isinstance(image, Image.Image):
        try:  # Pillow reads the pixels only now
            return to_rgb(ImageOps.exif_transpose(image))
        except DamagedImage:
            raise
        except BROKEN as error:
            raise DamagedImage(f"cannot decode {image}: {error}") from error
    try:
        return decode(Path(image).read_bytes())
    except DamagedImage as error:
        raise DamagedImage(f"{image}: {error}") from error
    except OSError as error:
        raise RadioError(f"cannot read {image}: {error}") from error
