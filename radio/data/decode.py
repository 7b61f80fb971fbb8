"""Bytes to an upright RGB picture, or the reason why not."""

from __future__ import annotations

import io
import struct

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from radio.errors import RadioError

MAX_PIXELS = 178_956_970  # Pillow's own bound against decompression bombs
# What Pillow's decoders raise on broken bytes; they read from memory, so none is an I/O error.
BROKEN = (
    UnidentifiedImageError,
    OSError,
    SyntaxError,
    ValueError,
    IndexError,
    EOFError,
    struct.error,
    Image.DecompressionBombError,
)


class DamagedImage(RadioError):
    """A picture that cannot be decoded whole; the message is the reason."""


def decode(data: bytes) -> Image.Image:
    """Return the picture in RGB, turned upright by its EXIF tag.

    Grey becomes three equal channels; 16-bit grey is scaled to 8 bits, not clipped; CMYK and
    palettes are converted; transparency lies on white; of an animation the first frame counts.

    Raises:
        DamagedImage: no picture, cut short, or more than 178 megapixels.
    """
    if not data:
        raise DamagedImage("the file is empty")
    try:
        image = Image.open(io.BytesIO(data))
        width, height = image.size  # from the header: bombs are refused before they are decoded
        if width * height > MAX_PIXELS:
            raise DamagedImage(f"{width} x {height} px is more than {MAX_PIXELS} pixels")
        image.load()
        return _to_rgb(ImageOps.exif_transpose(image))
    except DamagedImage:
        raise
    except BROKEN as error:
        raise DamagedImage(f"cannot decode {len(data)} bytes: {error}") from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image, dtype=np.float64)
        scale = 255.0 / 65535.0 if values.max(initial=0.0) > 255 else 1.0
        grey = np.clip(np.rint(values * scale), 0, 255).astype(np.uint8)
        return Image.fromarray(grey).convert("RGB")
    if "A" in image.mode or "transparency" in image.info:
        layer = image.convert("RGBA")
        white = Image.new("RGBA", layer.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, layer).convert("RGB")
    return image.convert("RGB")
