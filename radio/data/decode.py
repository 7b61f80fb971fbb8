"""Bytes to an upright RGB picture, or the reason why not."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
from PIL import ExifTags, Image, ImageFile, UnidentifiedImageError

from radio.errors import RadioError

MAX_PIXELS = 178_956_970  # Pillow's own bound against decompression bombs
# What is tried, by content and not by name; Pillow's list also has formats that run programs.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "PPM", "JPEG2000")
# What Pillow's decoders raise on broken bytes; they read from memory, so none is an I/O error.
BROKEN = (
    ArithmeticError,
    LookupError,
    OSError,
    RuntimeError,
    SyntaxError,
    TypeError,
    ValueError,
    EOFError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
    Image.DecompressionBombWarning,  # where warnings are errors
)
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class DamagedImage(RadioError):
    """A picture that cannot be decoded whole; the message is the reason."""


def decode(data: bytes) -> Image.Image:
    """Return the picture in RGB, turned upright by its EXIF tag.

    Grey becomes three equal channels; 16-bit grey is scaled to 8 bits, not clipped; CMYK and
    palettes are converted by Pillow's own rules, without colour profiles; transparent pixels lie
    on white; of an animation the first frame counts. Pixels never depend on the size wanted
    later (no draft mode).

    Raises:
        DamagedImage: no picture, cut short, no pixels, more than 178 megapixels (from the header,
            before anything is decoded), or a mode without an agreed white (float, Lab).
    """
    if not data:
        raise DamagedImage("the file is empty")
    # Another library's switch would make grey pixels out of the missing half of a cut file.
    ImageFile.LOAD_TRUNCATED_IMAGES = False
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        _refuse_size(*image.size)
        image.load()
        return to_rgb(_upright(image))
    except DamagedImage:
        raise
    except UnidentifiedImageError as error:
        expected = ", ".join(FORMATS)
        raise DamagedImage(f"{len(data)} bytes are no picture of {expected}") from error
    except BROKEN as error:
        raise DamagedImage(f"cannot decode {len(data)} bytes: {error}") from error


def _refuse_size(width: int, height: int) -> None:
    if width < 1 or height < 1:
        raise DamagedImage(f"{width} x {height} px is no picture")
    if width * height > MAX_PIXELS:
        raise DamagedImage(f"{width} x {height} px is more than {MAX_PIXELS} pixels")


def _upright(image: Image.Image) -> Image.Image:
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    except BROKEN:
        return image  # broken metadata beside whole pixels is no damage
    turn = UPRIGHT.get(orientation) if isinstance(orientation, int) else None
    if turn is None:
        return image
    upright = image.transpose(turn)
    # transpose keeps the tag, and who reads it again would turn the picture twice.
    for named in ("exif", "xmp", "XML:com.adobe.xmp", "Raw profile type exif"):
        upright.info.pop(named, None)
    return upright


def to_rgb(image: Image.Image) -> Image.Image:
    """Return the picture in RGB by the rules of `decode`.

    Raises:
        DamagedImage: a mode without an agreed white (float, Lab).
    """
    if image.mode.startswith("I"):  # "I;16" and its byte orders; "I" is how older Pillows say it
        values = np.asarray(image).astype(np.float64) * (255.0 / 65535.0)
        grey = np.clip(np.rint(values), 0, 255).astype(np.uint8)
        return Image.fromarray(grey).convert("RGB")
    if image.mode in ("F", "LAB"):
        raise DamagedImage(f"pixels of mode {image.mode} are not read; save it as 8 or 16 bits")
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        layer = image.convert("RGBA")
        white = Image.new("RGBA", layer.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, layer).convert("RGB")
    return image.convert("RGB")
