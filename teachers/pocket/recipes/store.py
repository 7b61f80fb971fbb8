"""Writing a pocket teacher's folder: half-precision weights, how they were made, a model card."""

from __future__ import annotations

import hashlib
import json
import platform
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from teachers.pocket.recipes.checkpoint import Origin
from teachers.weights import POCKET, WEIGHTS

LARGEST = 10_000_000  # bytes
SHARED = ("text", "views of 128 px", "trunk")  # parts that several teachers start from
TERMS = (
    "The pictures that it learnt from are for non-commercial research (ImageNet, Flickr8k, COCO's "
    "pictures, CamVid) or have no stated licence: use these weights for research and tests only."
)


@dataclass
class Making:
    """What a card says: purpose, start, data, settings; curves and CPU minutes of each part.

    `data` are the sets' names, `data_print` a hash of them.
    """

    name: str
    purpose: str
    start: str
    data: tuple[str, ...]
    settings: dict[str, Any]
    seed: int
    work: Path
    data_print: str
    curves: dict[str, list[dict[str, float]]] = field(default_factory=dict)
    minutes: dict[str, float] = field(default_factory=dict)

    def origin(self, steps: int) -> Origin:
        """Return what decides the weights of a training of so many steps."""
        return Origin(self.seed, steps, self.data_print)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Add up the CPU minutes that a part takes, also when it is cut off and goes on later.

        Those of all threads, so that waiting for other work does not count. What several teachers
        share (SHARED) has one name and is made once.
        """
        file = self.work / "minutes.json"
        start = time.process_time()
        try:
            yield
        finally:
            known = json.loads(file.read_text()) if file.exists() else {}
            known[name] = known.get(name, 0.0) + (time.process_time() - start) / 60
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(known, indent=1))
            self.minutes[name] = round(known[name], 1)


def store(recipe: Making, state: Mapping[str, Tensor]) -> Path:
    """Write `teachers/pocket/<name>`: model.safetensors, training.json and README.md."""
    folder = POCKET / recipe.name
    folder.mkdir(parents=True, exist_ok=True)
    half = {
        key: (value.half() if value.is_floating_point() else value).contiguous().clone()
        for key, value in state.items()
    }
    save_file(half, folder / WEIGHTS)
    size = (folder / WEIGHTS).stat().st_size
    if size > LARGEST:
        raise ValueError(f"{folder / WEIGHTS} has {size} bytes; at most {LARGEST} may ship")
    told = {
        "name": recipe.name,
        "seed": recipe.seed,
        "settings": recipe.settings,
        "data": recipe.data,
        "cpu_minutes": recipe.minutes,
        "machine": platform.processor() or platform.machine(),
        "versions": {name: version(name) for name in ("torch", "timm", "open_clip_torch")},
        "curves": recipe.curves,
    }
    (folder / "training.json").write_text(json.dumps(told, indent=1) + "\n")
    (folder / "README.md").write_text(card(recipe, half, size))
    return folder


def card(recipe: Making, state: Mapping[str, Tensor], size: int) -> str:
    """Return the model card in Markdown."""
    digest = hashlib.sha256((POCKET / recipe.name / WEIGHTS).read_bytes()).hexdigest()
    count = sum(value.numel() for value in state.values() if value.is_floating_point())
    settings = "\n".join(f"| {key} | {value} |" for key, value in recipe.settings.items())
    data = "\n".join(f"- {name}" for name in recipe.data)
    return f"""# pocket_{recipe.name}

{recipe.purpose}

**Start.** {recipe.start}

**Learnt from** (train shards only):

{data}

**Terms.** {TERMS}

**Size.** {count / 1e6:.2f} M parameters, {size / 1e6:.1f} MB in half precision; SHA-256 {digest}.

**Recipe.** `make pocket`, or `python -m teachers.pocket.recipes {recipe.name} --data DIR`: seed
{recipe.seed}. Curves: training.json.

**Cost.** {cost(recipe.minutes, recipe.curves)}

| setting | value |
|---|---|
{settings}

{table_of(recipe.curves)}

What it can do is measured by `radio evaluate pocket_{recipe.name} --task TASK --data DIR`;
`make results` measures all of it.
"""


def cost(
    minutes: Mapping[str, float], curves: Mapping[str, Sequence[Mapping[str, int | float]]]
) -> str:
    """Return what a card says of time: own and shared CPU minutes, and the clock's of curves."""
    told = {part: f"{part} {spent:g}" for part, spent in minutes.items()}
    own = ", ".join(text for part, text in told.items() if part not in SHARED)
    shared = ", ".join(text for part, text in told.items() if part in SHARED)
    ends = {name: rows[-1] for name, rows in curves.items() if "minutes" in rows[-1]}
    clock = ", ".join(f"{k} {row['minutes']:.1f} (step {row['step']})" for k, row in ends.items())
    return f"""CPU minutes of its own parts: {own};
of those that several teachers start from, made once: {shared};
{sum(minutes.values()):.1f} in all. Minutes by the clock to the last row of a curve: {clock}."""


def table_of(curves: Mapping[str, list[dict[str, float]]]) -> str:
    """Return the first and the last value of every curve as a table."""
    rows = [
        f"| {part}: {key} | {rows[0][key]:.3g} | {rows[-1][key]:.3g} |"
        for part, rows in curves.items()
        for key in rows[0]
        if key not in ("step", "minutes")
    ]
    return "\n".join(["| curve | first | last |", "|---|---|---|", *rows])
