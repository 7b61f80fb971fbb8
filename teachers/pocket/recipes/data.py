"""The small image sets that the pocket teachers learn from: shards, pictures and views of them."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import webdataset
from jaxtyping import Float, UInt8
from PIL import Image, ImageOps
from timm.data import ImageNetInfo
from torch import Tensor
from torchvision.transforms import v2

NUM_HELD_OUT = 20  # classes of tiny-imagenet-100 whose names and pictures are never paired
HELD_OUT_SEED = 0
CLASSES = "classes.txt"
SCALE = (0.35, 1.0)  # share of the picture's area that a view may show

Image3 = UInt8[Tensor, "3 h w"]


class RecipeError(ValueError):
    """What a user of the recipes can mend; printed without a traceback."""


@dataclass(frozen=True)
class Classes:
    """The classes of tiny-imagenet-100: WordNet ids, names, and those held out for zero-shot."""

    synsets: tuple[str, ...]
    names: tuple[str, ...]
    held_out: tuple[int, ...]

    @classmethod
    def read(cls, folder: Path) -> Classes:
        """Read classes.txt: number, WordNet id and names, separated by tabs."""
        rows = [line.split("\t") for line in (folder / CLASSES).read_text().splitlines()]
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(HELD_OUT_SEED))
        held_out = tuple(sorted(order[:NUM_HELD_OUT].tolist()))
        return cls(tuple(row[1] for row in rows), tuple(row[2] for row in rows), held_out)

    @property
    def seen(self) -> tuple[int, ...]:
        """The classes that may be paired with their names."""
        return tuple(at for at in range(len(self.names)) if at not in self.held_out)


def samples(folder: Path, split: str) -> Iterator[dict[str, Any]]:
    """Yield the samples of a set's split in order: `__key__`, and bytes by field.

    Raises:
        RecipeError: the folder has no shard of the split.
    """
    shards = [str(path) for path in shards_of(folder, split)]
    yield from webdataset.WebDataset(shards, shardshuffle=False, empty_check=False)


def shards_of(folder: Path, split: str) -> list[Path]:
    """Return the shards of a set's split in order.

    Raises:
        RecipeError: there is none.
    """
    shards = sorted(folder.glob(f"{split}-*.tar"))
    if not shards:
        raise RecipeError(
            f"no {split}-*.tar in '{folder}'; give the folder of image sets as --data"
        )
    return shards


def fingerprint(folder: Path, sets: Sequence[str]) -> str:
    """Return a SHA-256 over the train shards of some sets and what their classes are called.

    Raises:
        RecipeError: a set has no train shard.
    """
    digest = hashlib.sha256()
    for name in sets:
        classes = folder / name / CLASSES
        for path in [*shards_of(folder / name, "train"), *([classes] if classes.exists() else [])]:
            content = hashlib.sha256(path.read_bytes()).hexdigest()
            digest.update(f"{name}/{path.name} {content}\n".encode())
    return digest.hexdigest()


def claim(work: Path, data: str) -> None:
    """Note of which data a work folder is, since not all that is kept in it says so.

    Raises:
        RecipeError: it is of other data, or holds files and does not say of which.
    """
    note = work / "data.txt"
    if not note.exists() and not (work.exists() and any(work.iterdir())):
        work.mkdir(parents=True, exist_ok=True)
        note.write_text(data)
    if not note.exists() or note.read_text() != data:
        raise RecipeError(
            f"{work} holds what was made of other image sets; give another --work folder, or "
            "delete that one"
        )


def rgb(data: bytes) -> Image3:
    """Decode a picture: upright, RGB."""
    image = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def grey(data: bytes) -> UInt8[Tensor, "h w"]:
    """Decode a label map as it is."""
    return torch.from_numpy(np.array(Image.open(io.BytesIO(data))))


def captions(sample: dict[str, Any]) -> list[str]:
    """Return all captions of a sample of flickr8k."""
    return [str(text) for text in json.loads(sample["json"])["captions"]]


def lemmas() -> dict[str, str]:
    """Return the names of every WordNet synset that timm knows, by id."""
    info = ImageNetInfo("imagenet22k")
    return {synset: info.label_name_to_description(synset) for synset in info.label_names()}


def definitions() -> list[str]:
    """Return "names: what they are" of every synset that timm knows."""
    info = ImageNetInfo("imagenet22k")
    return [info.label_name_to_description(name, detailed=True) for name in info.label_names()]


def imagenet_synsets() -> list[str]:
    """Return the 1000 synsets of ImageNet-1k in the order of a classifier's rows."""
    return list(ImageNetInfo("imagenet-1k").label_names())


def views(
    images: Sequence[Image3], size: int, seed: int | None
) -> Float[Tensor, "batch 3 size size"]:
    """Return one view of each picture in [0, 1]: a seeded crop and flip, or all of it, squashed."""
    if seed is None:
        whole = v2.Resize((size, size), interpolation=v2.InterpolationMode.BICUBIC, antialias=True)
        return torch.stack([whole(image) for image in images]).float() / 255
    crop = v2.Compose(
        [
            v2.RandomResizedCrop(
                size, SCALE, interpolation=v2.InterpolationMode.BICUBIC, antialias=True
            ),
            v2.RandomHorizontalFlip(),
        ]
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return torch.stack([crop(image) for image in images]).float() / 255
