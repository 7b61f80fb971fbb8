"""A small data folder of the form that tasks measure on."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from picture_zoo import saved, write_tar
from PIL import Image

CLASSES = "3\tn03\tred, crimson\n5\tn05\tgreen\n8\tn08\tblue\n"
COLOURS = {3: (200, 40, 40), 5: (40, 200, 40), 8: (40, 40, 200)}


def coloured(label: int, rng: np.random.Generator, side: int = 24) -> Image.Image:
    """A noisy picture of its class's colour; a third of them hard to tell."""
    spread = 30 if rng.random() < 0.67 else 140
    noise = rng.normal(0, spread, 3) + rng.normal(0, 30, (side, side, 3))
    return Image.fromarray(np.clip(np.array(COLOURS[label]) + noise, 0, 255).astype(np.uint8))


def sample(label: int, rng: np.random.Generator) -> dict[str, bytes]:
    side = 24
    shape = np.zeros((side, side), np.uint8)
    shape[4:12, 6:20] = 1
    facts = {
        "instances": [{"id": 1, "class": 1, "area": 112, "iscrowd": 0}],
        "captions": ["a", "b"],
    }
    return {
        "png": saved(Image.fromarray(shape)),
        "jpg": saved(coloured(label, rng, side), "JPEG", quality=95),
        "cls": str(label).encode(),
        "json": json.dumps(facts).encode(),
        "txt": b"a\n",
    }


def write_split(
    folder: Path, name: str, samples: Sequence[Mapping[str, bytes]], per_shard: int = 40
) -> None:
    for at in range(0, len(samples), per_shard):
        members = [
            (f"{number:06d}.{field}", data)
            for number, fields in enumerate(samples[at : at + per_shard], at)
            for field, data in fields.items()
        ]
        write_tar(folder / f"{name}-{at // per_shard:06d}.tar", members)


def write_folder(folder: Path, train: int = 60, val: int = 30, classes: str = CLASSES) -> Path:
    """Write seeded samples of three colours, and return the folder."""
    rng = np.random.default_rng(0)
    labels = list(COLOURS)
    for name, count in (("train", train), ("val", val)):
        write_split(folder, name, [sample(labels[n % 3], rng) for n in range(count)])
    (folder / "classes.txt").write_text(classes)
    return folder
