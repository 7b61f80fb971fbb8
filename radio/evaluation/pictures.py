"""Labelled pictures to measure on: a folder of WebDataset tars, `<split>-000000.tar` and on.

Fields of a sample: a picture, `cls` (class number as text), label maps (`png`, `sem.png`), `json`
(`instances`, `captions`), `txt` (one caption). `classes.txt` has a tab-separated line a class:
number, further ids, name, and where there is one its kind (thing, stuff, ignore).
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int, UInt8
from PIL import Image
from torch import Tensor

from radio.data.decode import BROKEN, DamagedImage, decode
from radio.data.storage import read_range
from radio.data.tar_index import EXTENSIONS, split_name
from radio.errors import RadioError
from radio.files import sha256_of

SHARD = re.compile(r"(?P<split>.+)-\d+\.tar")
CLASSES = "classes.txt"
KINDS = frozenset({"", "thing", "stuff", "ignore"})


class Pictures:
    """A data folder: its splits, and what its classes are called.

    `classes` maps a class number to its name (the first synonym), `class_texts` to all that
    classes.txt says in the name's place, `class_kinds` to thing, stuff, ignore or "".

    Raises:
        RadioError: no folder, no tar in it, or a classes.txt that cannot be read.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise RadioError(f"{self.folder} is no folder; expected one with train-000000.tar ...")
        self._shards: dict[str, list[Path]] = {}
        for path in sorted(self.folder.glob("*.tar")):
            if match := SHARD.fullmatch(path.name):
                self._shards.setdefault(match["split"], []).append(path)
        if not self._shards:
            raise RadioError(
                f"{self.folder} holds no shards; expected train-000000.tar, val-000000.tar, ..."
            )
        self.name = self.folder.resolve().name
        self.class_texts, self.class_kinds = _read_classes(self.folder / CLASSES)
        self.classes = {n: text.split(",")[0].strip() for n, text in self.class_texts.items()}
        self._splits: dict[str, Split] = {}

    def split(self, name: str) -> Split:
        """Return a split; RadioError when there is none of that name, listing those there are."""
        if name not in self._shards:
            raise RadioError(
                f"{self.folder} has no split '{name}' ({name}-*.tar); it has: "
                f"{', '.join(self._shards)}"
            )
        if name not in self._splits:
            self._splits[name] = Split(name, self._shards[name], self.classes)
        return self._splits[name]

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) over every tar's bytes."""
        parts = [f"{name} {self.split(name).fingerprint}" for name in sorted(self._shards)]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()


@dataclass(frozen=True)
class _Member:
    shard: Path
    offset: int
    size: int


class Split:
    """The samples of one split in the order of its tars.

    Raises:
        RadioError: a tar that cannot be read, no sample in any, or a key that occurs twice.
    """

    def __init__(self, name: str, shards: Sequence[Path], classes: dict[int, str]) -> None:
        self.name = name
        self.shards = tuple(shards)
        self.classes = classes
        self._samples: dict[str, dict[str, _Member]] = {}
        for shard in self.shards:
            self._read(shard)
        if not self._samples:
            raise RadioError(
                f"the split '{name}' of {self.shards[0].parent} has no sample in "
                f"{', '.join(shard.name for shard in self.shards)}; expected files such as "
                "000000.jpg in a tar: write it again"
            )
        self.keys = list(self._samples)
        self.fields = tuple(
            sorted({field for sample in self._samples.values() for field in sample})
        )

    def __len__(self) -> int:
        return len(self.keys)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) over the tars' bytes, in order."""
        sums = " ".join(sha256_of(shard) for shard in self.shards)
        return hashlib.sha256(sums.encode()).hexdigest()

    def has(self, field: str) -> bool:
        """Whether every sample has a field; `captions` and `instances` are looked for in the first.

        `captions` are those of `json` or the one of `txt`.
        """
        if field in ("captions", "instances"):
            found = "json" in self.fields and field in self._json(0)
            return found or (field == "captions" and self.has("txt"))
        return all(field in sample for sample in self._samples.values())

    def picture(self, index: int) -> Image.Image:
        """Return a picture, upright and in RGB.

        Raises:
            DamagedImage: it cannot be decoded; a RadioError that names the sample.
        """
        sample = self._samples[self.keys[index]]
        field = next((name for name in EXTENSIONS if name in sample), None)
        if field is None:
            raise self._missing(index, "jpg")
        try:
            return decode(self._bytes(index, field))
        except DamagedImage as error:
            raise DamagedImage(f"{self._where(index)}: {error}") from error

    def labels(self) -> Int[Tensor, " pictures"]:
        """Return every sample's class number.

        Raises:
            RadioError: a sample without `cls`, or one that is no number of classes.txt.
        """
        return torch.tensor([self._label(index) for index in range(len(self))])

    def label_map(self, index: int, suffix: str = "png") -> UInt8[np.ndarray, "h w"]:
        """Return a sample's label or instance map, of its picture's size.

        Raises:
            RadioError: no such field, no 8-bit map of one channel, or another size.
        """
        try:
            image = Image.open(io.BytesIO(self._bytes(index, suffix)))
            image.load()
        except BROKEN as error:
            if isinstance(error, RadioError):
                raise
            raise RadioError(
                f"{self._where(index)}: its {suffix} cannot be read: {error}"
            ) from error
        if image.mode not in ("L", "P"):
            raise RadioError(
                f"{self._where(index)}: its {suffix} has pixels of mode {image.mode}; expected "
                "8-bit grey, a class or instance number a pixel"
            )
        size = self.picture(index).size
        if image.size != size:
            raise RadioError(
                f"{self._where(index)}: its {suffix} is {image.width} x {image.height} px but its "
                f"picture is {size[0]} x {size[1]}; expected a map of the picture's size"
            )
        return np.array(image, dtype=np.uint8)

    def captions(self, index: int) -> list[str]:
        """Return a picture's captions: those of `json`, or the one of `txt`.

        Raises:
            RadioError: it has neither, or none at all.
        """
        sample = self._samples[self.keys[index]]
        found: object = self._json(index).get("captions") if "json" in sample else None
        if found is None and "txt" in sample:
            found = [self._text(index, "txt").strip()]
        if found is None:
            raise self._missing(index, "captions (in json, or txt)")
        if not isinstance(found, list) or not found or not all(isinstance(c, str) for c in found):
            raise RadioError(f"{self._where(index)}: its captions are {found!r}; expected texts")
        return found

    def instances(self, index: int) -> list[dict[str, Any]]:
        """Return the entries of `instances` in `json`: id, class, area, iscrowd, bbox, ...

        Raises:
            RadioError: there is no such list.
        """
        found = self._json(index).get("instances")
        if not isinstance(found, list):
            raise self._missing(index, "instances (in json)")
        return found

    def _label(self, index: int) -> int:
        text = self._text(index, "cls").strip()
        if not re.fullmatch(r"-?\d+", text):
            raise RadioError(f"{self._where(index)}: cls is {text!r}; expected a class number")
        label = int(text)
        if label not in self.classes:
            known = f"{min(self.classes)} to {max(self.classes)}" if self.classes else "no class"
            raise RadioError(
                f"{self._where(index)}: class {label} is not in {CLASSES}, which has {known}"
            )
        return label

    def _json(self, index: int) -> dict[str, Any]:
        try:
            found = json.loads(self._text(index, "json"))
        except json.JSONDecodeError as error:
            raise RadioError(f"{self._where(index)}: its json cannot be read: {error}") from error
        if not isinstance(found, dict):
            raise RadioError(f"{self._where(index)}: its json is no mapping")
        return found

    def _text(self, index: int, field: str) -> str:
        try:
            return self._bytes(index, field).decode("utf-8")
        except UnicodeDecodeError as error:
            raise RadioError(f"{self._where(index)}: its {field} is no UTF-8: {error}") from error

    def _bytes(self, index: int, field: str) -> bytes:
        member = self._samples[self.keys[index]].get(field)
        if member is None:
            raise self._missing(index, field)
        return read_range(str(member.shard), member.offset, member.size)

    def _missing(self, index: int, field: str) -> RadioError:
        has = ", ".join(sorted(self._samples[self.keys[index]]))
        return RadioError(f"{self._where(index)} has no {field}; its fields are: {has}")

    def _where(self, index: int) -> str:
        return f"{self.shards[0].parent.name}/{self.name}, sample '{self.keys[index]}'"

    def _read(self, shard: Path) -> None:
        try:
            with tarfile.open(shard, "r:") as tar:
                members = [member for member in tar if member.isreg()]
        except (tarfile.TarError, OSError) as error:
            raise RadioError(
                f"{shard} is no plain tar ({error}); write or copy it again"
            ) from error
        for member in members:
            if (split := split_name(member.name)) is None:
                continue
            key, field = split
            sample = self._samples.setdefault(key, {})
            if field in sample:
                raise RadioError(f"{shard}: the sample '{key}' has two {field}")
            sample[field] = _Member(shard, member.offset_data, member.size)


def _read_classes(path: Path) -> tuple[dict[int, str], dict[int, str]]:
    """Return the text and the kind of every class; nothing of both without a classes.txt."""
    if not path.exists():
        return {}, {}
    lines = path.read_text(encoding="utf-8").splitlines()
    rows = [line.split("\t") for line in lines if line.strip()]
    for row in rows:
        if len(row) < 2 or not row[0].strip().isdigit():
            raise RadioError(
                f"{path}: the line {' '.join(row)!r} is no class; expected a number and a name, "
                "with tabs between"
            )
    numbers = [int(row[0]) for row in rows]
    if len(set(numbers)) < len(numbers):
        twice = next(number for number in numbers if numbers.count(number) > 1)
        raise RadioError(f"{path}: class {twice} is there twice")
    with_kinds = all(len(row) > 2 and row[-1].strip() in KINDS for row in rows)
    texts = [row[-2 if with_kinds else -1].strip() for row in rows]
    for number, text in zip(numbers, texts, strict=True):
        if not text.split(",")[0].strip():
            raise RadioError(
                f"{path}: class {number} has no name; expected it in the last column, or in every "
                "line a kind (thing, stuff, ignore or nothing) behind it"
            )
    kinds = [row[-1].strip() if with_kinds else "" for row in rows]
    return dict(zip(numbers, texts, strict=True)), dict(zip(numbers, kinds, strict=True))
