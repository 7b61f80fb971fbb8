"""The demo's pictures: photographs inside the scikit-image and scikit-learn wheels, as shards.

Nothing is downloaded, and nothing is in this package: each picture stays under its author's terms,
which `CREDITS` names as the two libraries state them. Their drawings, text pages, test patterns,
computed pictures and those under 300 pixels are left out. The two motorcycles are a stereo pair,
so both are trained on.
"""

from __future__ import annotations

import importlib.util
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from radio.data.decode import decode
from radio.data.plan import seed_for
from radio.data.shards import write_shards
from radio.data.views import random_crop
from radio.errors import RadioError

FOLDERS = {"scikit-image": ("skimage", "data"), "scikit-learn": ("sklearn", "datasets/images")}
CROPS = {"train": 40, "val": 16}  # of each photograph
SHORT_SIDE = 288  # of a crop in pixels, at most: a little more than the demo's largest view
AREA = (0.25, 1.0)  # of the photograph
JPEG_QUALITY = 95


@dataclass(frozen=True)
class Credit:
    """Whose photograph it is, under which terms, and on which side of the demo it stands."""

    split: str
    library: str
    subject: str
    author: str
    terms: str


def _skimage(split: str, subject: str, author: str, terms: str) -> Credit:
    return Credit(split, "scikit-image", subject, author, terms)


def _sklearn(split: str, subject: str, author: str) -> Credit:
    return Credit(split, "scikit-learn", subject, author, "CC BY 2.0")


MIDDLEBURY = "Middlebury 2014 stereo benchmark, Scharstein and others"
CREDITS = {
    "astronaut.png": _skimage("train", "Eileen Collins", "NASA", "public domain"),
    "brick.png": _skimage("train", "brick wall", "CC0Textures", "CC0"),
    "camera.png": _skimage("train", "photographer", "Lav Varshney", "CC0"),
    "chelsea.png": _skimage("train", "cat", "Stefan van der Walt", "CC0"),
    "china.jpg": _sklearn("train", "summer palace", "danielbuechele, Flickr 6061409035"),
    "clock_motion.png": _skimage("val", "blurred clock", "Stefan van der Walt", "public domain"),
    "coffee.png": _skimage("val", "cup of coffee", "Rachel Michetti, Pikolo Espresso Bar", "CC0"),
    "coins.png": _skimage("train", "Greek coins", "Brooklyn Museum", "no known restrictions"),
    "flower.jpg": _sklearn("val", "dahlia", "vultilion, Flickr 6056698931"),
    "grass.png": _skimage("train", "grass", "linolafett, DeviantArt", "CC0"),
    "gravel.png": _skimage("train", "gravel", "CC0Textures", "CC0"),
    "hubble_deep_field.jpg": _skimage("train", "galaxies", "NASA, HubbleSite", "public domain"),
    "ihc.png": _skimage("val", "stained colon", "CMMI", "no known restrictions"),
    "moon.png": _skimage("train", "surface of the moon", "not stated", "not stated"),
    "motorcycle_left.png": _skimage("train", "motorcycle", MIDDLEBURY, "not stated; cite"),
    "motorcycle_right.png": _skimage("train", "motorcycle", MIDDLEBURY, "not stated; cite"),
    "retina.jpg": _skimage("train", "human retina", "Mikael Häggström", "CC0"),
    "rocket.jpg": _skimage("train", "Falcon 9 before launch", "SpaceX", "public domain"),
}
TRAIN = tuple(name for name, credit in CREDITS.items() if credit.split == "train")
VAL = tuple(name for name, credit in CREDITS.items() if credit.split == "val")


def write_photographs(out: Path, seed: int = 0) -> dict[str, Path]:
    """Write `train-000000.tar` and `val-000000.tar` of seeded crops and return their paths.

    14 photographs are trained on with 40 crops each, 4 are held out with 16 each; fields `jpg`
    (short side at most 288 pixels, never enlarged) and `json` (source, box in its pixels). The
    same seed and libraries give the same bytes.

    Raises:
        RadioError: scikit-image or scikit-learn is not installed, or lacks a photograph.
    """
    out.mkdir(parents=True, exist_ok=True)
    paths = {}
    for split, names in (("train", TRAIN), ("val", VAL)):
        samples = (crop for name in names for crop in _crops(name, CROPS[split], seed))
        (paths[split],) = write_shards(samples, out / f"{split}-%06d.tar", max_bytes=1 << 40)
    return paths


def photograph(name: str) -> Image.Image:
    """Return one of CREDITS' photographs, whole and in RGB.

    Raises:
        RadioError: its library is not installed, or lacks it.
    """
    return decode(_path_of(name).read_bytes())


def held_out_pictures() -> dict[str, Image.Image]:
    """Return the held-out photographs, whole and in RGB, by name without extension."""
    return {Path(name).stem: photograph(name) for name in VAL}


def credits_table() -> str:
    """Return the credits as a Markdown table."""
    rows = ["| picture | from | shows | by | terms | side |", "|---|---|---|---|---|---|"]
    for name, who in CREDITS.items():
        cells = (f"`{name}`", who.library, who.subject, who.author, who.terms, who.split)
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def _crops(name: str, count: int, seed: int) -> Iterator[dict[str, Any]]:
    image = photograph(name)
    stem = Path(name).stem
    for number in range(count):
        crop_seed = seed_for(seed, f"photograph/{name}", number)
        box = random_crop(*image.size, crop_seed, AREA).box
        width, height = box[2] - box[0], box[3] - box[1]
        scale = min(1.0, SHORT_SIDE / min(width, height))
        size = round(width * scale), round(height * scale)
        view = image.resize(size, Image.Resampling.BICUBIC, box=box)
        buffer = io.BytesIO()
        view.save(buffer, "JPEG", quality=JPEG_QUALITY)
        yield {
            "__key__": f"{stem}-{number:02d}",
            "jpg": buffer.getvalue(),
            "json": json.dumps({"source": name, "box": list(box)}).encode(),
        }


def _path_of(name: str) -> Path:
    """Find a file in its wheel without importing the package, which takes seconds."""
    library = CREDITS[name].library
    package, inside = FOLDERS[library]
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise RadioError(
            f"the demo's photograph {name} is inside {library}, which is not installed; "
            'pip install "radio-distill[demo]"'
        )
    path = Path(spec.origin).parent / inside / name
    if not path.exists():
        raise RadioError(
            f'this version of {library} has no {name}; pip install --upgrade "radio-distill[demo]"'
        )
    return path
