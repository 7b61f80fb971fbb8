"""The pictures of all findings, put together once from a folder of image sets.

FOLDER/pictures/{train,val}-*.tar     what students learn from, and what is held out
FOLDER/classes/                       some shards of tiny-imagenet-100, for kNN
"""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from radio.data.shards import write_shards
from radio.errors import RadioError
from radio.evaluation.pictures import CLASSES, Pictures

CLASSES_SET, STREETS_SET = "tiny-imagenet-100", "camvid"
# Pictures of each set, the first of its shards.
TRAIN = {CLASSES_SET: 700, "flickr8k": 500, STREETS_SET: 280, "coco-instances": 70}
TRAIN |= {"people-masks": 250}
VAL = {CLASSES_SET: 16, "flickr8k": 16, STREETS_SET: 16, "coco-instances": 34, "people-masks": 14}
NEIGHBOUR_SHARDS = 2  # of the train split, about 18 pictures a class
DONE = "done.txt"


@dataclass(frozen=True)
class Material:
    """Where the pictures are; `streets` is camvid as it came."""

    pictures_folder: Path
    classes_folder: Path
    streets_folder: Path

    @property
    def train(self) -> str:
        """The pattern for `data.train`."""
        return f"{self.pictures_folder}/train-*.tar"

    @cached_property
    def pictures(self) -> Pictures:
        """Train and held-out pictures without labels."""
        return Pictures(self.pictures_folder)

    @cached_property
    def classes(self) -> Pictures:
        """Pictures of 100 classes."""
        return Pictures(self.classes_folder)

    @cached_property
    def streets(self) -> Pictures:
        """Pictures of streets with label maps."""
        return Pictures(self.streets_folder)


def put_together(data: Path, folder: Path) -> Material:
    """Return the material of the image sets below `data`, written to `folder` at the first call.

    Raises:
        RadioError: a set is not there.
    """
    pictures, classes = folder / "pictures", folder / "classes"
    if not (pictures / DONE).exists():
        for split, shares in (("train", TRAIN), ("val", VAL)):
            write_shards(_samples(data, split, shares), pictures / f"{split}-%06d.tar", 32 << 20)
        (pictures / DONE).touch()
    classes.mkdir(parents=True, exist_ok=True)
    for path in _class_files(data / CLASSES_SET):
        link = classes / path.name
        if not link.exists():
            link.symlink_to(path.resolve())
    return Material(pictures, classes, data / STREETS_SET)


def _class_files(folder: Path) -> list[Path]:
    return [
        *_shards(folder, "train")[:NEIGHBOUR_SHARDS],
        *_shards(folder, "val"),
        folder / CLASSES,
    ]


def _samples(data: Path, split: str, shares: Mapping[str, int]) -> Iterator[dict[str, Any]]:
    """Yield pictures alone, keyed by set, since every set counts from 000000."""
    for name, count in shares.items():
        for key, picture in _first(_shards(data / name, split), count):
            yield {"__key__": f"{name}/{key}", "jpg": picture}


def _first(shards: list[Path], count: int) -> Iterator[tuple[str, bytes]]:
    left = count
    for shard in shards:
        with tarfile.open(shard, "r:") as tar:
            for member in tar:
                if left and member.name.endswith(".jpg"):
                    file = tar.extractfile(member) or io.BytesIO()
                    left -= 1
                    yield member.name.removesuffix(".jpg"), file.read()


def _shards(folder: Path, split: str) -> list[Path]:
    found = sorted(folder.glob(f"{split}-*.tar"))
    if not found:
        raise RadioError(
            f"{folder} has no {split}-*.tar; give with --data the folder that holds the image sets "
            f"{', '.join(TRAIN)}"
        )
    return found
