"""The demo's pictures: photographs inside the scikit-image and scikit-learn wheels, as shards.

Drawings, text pages and test patterns of the wheels are left out; the two motorcycle pictures are a
stereo pair and stay on one side. The wheels' own README files name authors and licences (public
domain, CC0 and CC BY); nothing is downloaded.
"""

from __future__ import annotations

import importlib.util
import io
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import webdataset
from PIL import Image

from radio.data.decode import decode
from radio.data.plan import seed_for
from radio.data.views import random_crop
from radio.errors import RadioError

TRAIN = (
    "astronaut.png", "brick.png", "camera.png", "chelsea.png", "china.jpg", "coins.png",
    "grass.png", "gravel.png", "hubble_deep_field.jpg", "moon.png", "motorcycle_left.png",
    "motorcycle_right.png", "retina.jpg", "rocket.jpg",
)  # fmt: skip
VAL = ("coffee.png", "flower.jpg", "clock_motion.png", "ihc.png")
CROPS = {"train": 40, "val": 16}
SHORT_SIDE = 288  # of a crop in pixels: a little more than the largest view of the demo
AREA = (0.25, 1.0)


def write_photographs(out: Path, seed: int = 0) -> dict[str, Path]:
    """Write `train-000000.tar` and `val-000000.tar` of seeded crops and return their paths.

    14 photographs are trained on with 40 crops each, 4 are held out with 16 each; fields `jpg`
    and `json` (source, box in its pixels). The same seed gives the same bytes.

    Raises:
        RadioError: scikit-image or scikit-learn is not installed.
    """
    out.mkdir(parents=True, exist_ok=True)
    paths = {}
    for split, names in (("train", TRAIN), ("val", VAL)):
        temporary, final = out / f".{split}.tmp", out / f"{split}-000000.tar"
        crops = (_crops(name, CROPS[split], seed) for name in names)
        write_shard(temporary, (sample for some in crops for sample in some))
        temporary.replace(final)
        paths[split] = final
    return paths


def write_shard(path: Path, samples: Iterable[dict[str, Any]]) -> None:
    """Write samples (`__key__` and bytes by field) as one tar with fixed metadata."""
    with webdataset.TarWriter(str(path), mtime=0, user="radio", group="radio") as writer:
        for sample in samples:
            writer.write(sample)


def photograph(name: str) -> Image.Image:
    """Return one of the wheels' photographs in RGB."""
    return decode((_folder_of(name) / name).read_bytes())


def _crops(name: str, count: int, seed: int) -> Iterator[dict[str, Any]]:
    image = photograph(name)
    stem = Path(name).stem
    for number in range(count):
        crop_seed = seed_for(seed, f"photograph/{name}", number)
        crop = random_crop(*image.size, crop_seed, AREA)
        width, height = crop.box[2] - crop.box[0], crop.box[3] - crop.box[1]
        scale = SHORT_SIDE / min(width, height)
        size = round(width * scale), round(height * scale)
        view = image.resize(size, Image.Resampling.BICUBIC, box=crop.box)
        buffer = io.BytesIO()
        view.save(buffer, "JPEG", quality=92)
        facts = {"source": name, "box": [round(side, 2) for side in crop.box]}
        yield {
            "__key__": f"{stem}-{number:02d}",
            "jpg": buffer.getvalue(),
            "json": json.dumps(facts).encode(),
        }


def _folder_of(name: str) -> Path:
    """Find the wheel's folder without importing the package, which takes seconds."""
    for package, inside in (("skimage", "data"), ("sklearn", "datasets/images")):
        spec = importlib.util.find_spec(package)
        if spec is None or spec.origin is None:
            raise RadioError(
                "the demo's photographs are inside scikit-image and scikit-learn; "
                'pip install "radio-distill[demo]"'
            )
        folder = Path(spec.origin).parent / inside
        if (folder / name).exists():
            return folder
    raise RadioError(f"this version of scikit-image or scikit-learn has no {name}; update it")
