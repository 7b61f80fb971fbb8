"""The pictures of all findings, put together once from a folder of image sets.

FOLDER/pictures/{train,val}-*.tar     what students learn from, and what is held out
FOLDER/classes/                       some shards of tiny-imagenet-100, for kNN
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from radio.data.shards import open_images, write_shards
from radio.errors import RadioError
from radio.evaluation.pictures import CLASSES, Pictures
from radio.files import write_whole

CLASSES_SET, STREETS_SET = "tiny-imagenet-100", "camvid"
# Pictures of each set, the first of its shards: of train, of val.
SHARES = {
    CLASSES_SET: (700, 16),
    "flickr8k": (500, 16),
    STREETS_SET: (280, 16),
    "coco-instances": (70, 34),
    "people-masks": (250, 14),
}
NEIGHBOUR_SHARDS = 2  # of the train split, about 18 pictures a class
DONE = "done.txt"


@dataclass(frozen=True)
class Material:
    """Pictures without labels, pictures of 100 classes, and streets with label maps."""

    pictures: Pictures
    classes: Pictures
    streets: Pictures

    @property
    def train(self) -> str:
        """The pattern for `data.train`."""
        return f"{self.pictures.folder}/train-*.tar"


def put_together(data: Path, folder: Path) -> Material:
    """Return the material of the image sets below `data`, written to `folder` at the first call.

    Raises:
        RadioError: a set is not there, or the folder holds the material of other sets.
    """
    if missing := [name for name in SHARES if not (data / name).is_dir()]:
        raise RadioError(f"{data} has no {missing[0]}; give the folder of image sets with --data")
    pictures, classes = folder / "pictures", folder / "classes"
    told = "".join(f"{Pictures(data / n).fingerprint} {n} {c}\n" for n, c in SHARES.items())
    if (pictures / DONE).exists():
        if (pictures / DONE).read_text() != told:
            raise RadioError(
                f"{folder} was put together of other pictures than those of {data}; name another "
                "folder with --work"
            )
    else:
        for at, split in enumerate(("train", "val")):
            samples = _samples(data, split, {name: counts[at] for name, counts in SHARES.items()})
            write_shards(samples, pictures / f"{split}-%06d.tar", 32 << 20)
        write_whole(pictures / DONE, told)
    classes.mkdir(parents=True, exist_ok=True)
    known = data / CLASSES_SET
    shards = sorted(known.glob("train-*.tar"))[:NEIGHBOUR_SHARDS]
    for path in (*shards, *known.glob("val-*.tar"), known / CLASSES):
        if not (classes / path.name).exists():
            (classes / path.name).symlink_to(path.resolve())
    return Material(Pictures(pictures), Pictures(classes), Pictures(data / STREETS_SET))


def _samples(data: Path, split: str, shares: Mapping[str, int]) -> Iterator[dict[str, Any]]:
    """Yield pictures alone, keyed by set, since every set counts from 000000."""
    for name, count in shares.items():
        source = open_images(f"{data / name}/{split}-*.tar")
        for at in range(min(count, len(source))):
            yield {"__key__": f"{name}/{source.key(at)}", "jpg": source.read(at)}
