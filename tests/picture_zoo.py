"""Odd pictures made in memory, for every test that reads pictures."""

from __future__ import annotations

import io
import struct
import tarfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image


def colours(width: int = 48, height: int = 40, seed: int = 0) -> Image.Image:
    """A smooth coloured picture."""
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def saved(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def jpeg(seed: int = 0, width: int = 48, height: int = 40) -> bytes:
    return saved(colours(width, height, seed), "JPEG", quality=90)


def png(seed: int = 0, width: int = 48, height: int = 40) -> bytes:
    return saved(colours(width, height, seed))


def cut_in_half(data: bytes) -> bytes:
    return data[: len(data) // 2]


def sixteen_bit(values: np.ndarray) -> bytes:
    return saved(Image.fromarray(values.astype(np.uint16)))


def palette_with_transparency() -> bytes:
    """Left half red, right half transparent (its palette entry says blue)."""
    image = Image.new("P", (8, 4), 0)
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.paste(1, (4, 0, 8, 4))
    return saved(image, transparency=1)


def huge_png(width: int = 20_000, height: int = 20_000) -> bytes:
    """A header that claims many pixels, with almost no data behind it."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        check = zlib.crc32(kind + body)
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", check)

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = zlib.compress(b"\0" * 100)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    )


def animation() -> bytes:
    frames = [Image.new("RGB", (6, 5), colour) for colour in ("red", "lime", "blue")]
    return saved(frames[0], "GIF", save_all=True, append_images=frames[1:], duration=40)


def with_orientation(image: Image.Image, orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return saved(image, "PNG", exif=exif)


def write_tar(path: Path, members: Mapping[str, bytes] | Sequence[tuple[str, bytes]]) -> Path:
    """Write a tar by tarfile itself, so that the writer under test is not its own judge."""
    pairs = list(members.items()) if isinstance(members, Mapping) else members
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in pairs:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path
