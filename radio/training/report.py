"""A run's report: one HTML file that works offline.

Everything is inside the file: figures are SVG, pictures base64, style in the head. It is made
from config.yaml and metrics.jsonl alone, so it can be written in the middle of a run too.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from radio.config import Config, from_yaml
from radio.errors import RadioError
from radio.files import write_whole
from radio.training.equivariance import MESA
from radio.training.figures import MOST_POINTS, NUM_COLOURS, curve, data_address, panel
from radio.training.run_folder import RunFolder

SIDE = 224  # px of a PCA picture's longer side
FLAT = 1e-6  # singular values below this share of the features' norm are float32 rounding
OUTLIERS = 0.02  # share of positions allowed beyond either end of the colour scale
CURVES_FROM = 3  # held-out measurements that make a curve; fewer are in the table anyway
Record = Mapping[str, Any]


@dataclass(frozen=True)
class Picture:
    """A held-out photograph and, per teacher, (target [d, h, w], student's prediction [d, h, w]).

    The maps are standardized features; the student's grid may be another than the teacher's.
    """

    name: str
    image: UInt8[Tensor, "3 h w"]
    maps: Mapping[str, tuple[Tensor, Tensor]]


def write_report(run: Path, pictures: Sequence[Picture] = ()) -> Path:
    """Write `run`/report.html and return its path.

    Raises:
        RadioError: `run` holds no metrics.jsonl, or a config.yaml that is not a run's.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    folder = RunFolder(Path(run))
    if not folder.metrics.exists():
        raise RadioError(
            f"{run} has no metrics.jsonl, so there is nothing to report; expected the folder that "
            "`radio train` wrote (its out=), after the first logged step"
        )
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    html = environment.get_template("report.html.j2").render(_facts(folder, pictures))
    path = folder.path / "report.html"
    write_whole(path, html)
    return path


def pca_pictures(
    target: Float[Tensor, "d h w"], predicted: Float[Tensor, "d rows columns"]
) -> tuple[UInt8[np.ndarray, "h1 w1 3"], UInt8[np.ndarray, "h2 w2 3"]]:
    """Draw a teacher's features and the student's prediction in the same colours.

    Red, green and blue are the first three principal components of the target's positions
    (float64; the sign of a component makes its largest entry positive). The prediction is drawn
    with the target's mean, components and colour range, so equal colours are equal features.
    Components that the target does not have are mid-gray.
    """
    positions = target.detach().cpu().double().flatten(1).T
    mean = positions.mean(0)
    _, strengths, directions = torch.linalg.svd(positions - mean, full_matrices=False)
    found = directions[strengths > FLAT * positions.norm()][:3]
    largest = found.gather(1, found.abs().argmax(1, keepdim=True))
    basis = torch.zeros(3, len(mean), dtype=torch.float64)
    basis[: len(found)] = found * largest.sign()
    coordinates = (positions - mean) @ basis.T
    low, high = coordinates.quantile(OUTLIERS, 0), coordinates.quantile(1 - OUTLIERS, 0)
    narrow = high <= low  # nearly all positions alike: the few others decide the range
    low = torch.where(narrow, coordinates.amin(0), low)
    high = torch.where(narrow, coordinates.amax(0), high)

    def draw(features: Tensor) -> np.ndarray:
        flat = features.detach().cpu().double().flatten(1).T
        shares = ((flat - mean) @ basis.T - low) / (high - low)  # 0 / 0 without a component
        colours = torch.where(high > low, shares.clamp(0, 1), 0.5) * 255
        pixels = colours.round().to(torch.uint8).view(features.shape[1], features.shape[2], 3)
        return _enlarge(pixels.numpy())

    return draw(target), draw(predicted)


def _enlarge(pixels: np.ndarray) -> np.ndarray:
    """Return the picture with its longer side at SIDE px, each position a flat square."""
    height, width = pixels.shape[:2]
    scale = SIDE / max(height, width)
    rows, columns = max(1, round(height * scale)), max(1, round(width * scale))
    row, column = np.arange(rows) * height // rows, np.arange(columns) * width // columns
    enlarged: np.ndarray = pixels[row[:, None], column]
    return enlarged


def _facts(folder: RunFolder, pictures: Sequence[Picture]) -> dict[str, Any]:
    """Return everything that the template shows."""
    records = folder.records()
    steps = [record for record in records if "losses" in record]
    measured = [record for record in records if "held_out" in record]
    config, text = _read_config(folder.path / "config.yaml")
    teachers = _teacher_names(config, steps, measured, pictures)
    colours = {name: f"--c{at % NUM_COLOURS}" for at, name in enumerate(teachers)}
    return {
        "name": folder.path.resolve().name,
        "config": config,
        "config_text": text,
        "teachers": [name for name in teachers if name != MESA.split("/")[0]],
        "colours": colours,
        "weights": _weights(config),
        "done": max((int(record["step"]) for record in records), default=0),
        "planned": sum(stage.steps for stage in config.stages) if config else None,
        "rows": _headline(measured, teachers),
        "measured": [int(record["step"]) for record in measured],
        "speed": _speed(steps),
        "damaged": int(steps[-1]["damaged"]) if steps else 0,
        "loss_panels": _loss_panels(steps, teachers, config),
        "fidelity_panels": _fidelity_panels(measured, teachers),
        "speed_panels": _speed_panels(steps, teachers),
        "thinned": len(steps) > MOST_POINTS,
        "pictures": [_shown(picture, teachers) for picture in pictures],
    }


def _read_config(path: Path) -> tuple[Config | None, str]:
    if not path.exists():
        return None, ""
    text = path.read_text(encoding="utf-8")
    try:
        return from_yaml(text), text
    except RadioError as error:
        raise RadioError(f"{path}: {error}") from error


def _weights(config: Config | None) -> dict[str, str]:
    """Say of each teacher where its weights come from."""
    teachers = config.teachers if config else {}
    return {
        name: f"pretrained: {teacher.pretrained}" if teacher.pretrained else "seeded, untrained"
        for name, teacher in teachers.items()
    }


def _teacher_names(
    config: Config | None,
    steps: Sequence[Record],
    measured: Sequence[Record],
    pictures: Sequence[Picture],
) -> list[str]:
    """Return every teacher once, in the order of the configuration, then of appearance.

    The student's average, where it has a loss, is among them: it has a curve and a colour.
    """
    names = list(config.teachers) if config else []
    names += [loss.rpartition("/")[0] for record in steps for loss in record["losses"]]
    names += [row["teacher"] for record in measured for row in record["held_out"]]
    names += [name for picture in pictures for name in picture.maps]
    return list(dict.fromkeys(names))


def _headline(measured: Sequence[Record], teachers: Sequence[str]) -> list[dict[str, Any]]:
    """Return a row per teacher, resolution and merging: first and last measurement.

    A single measurement counts as `before` only when it was made at step 0.
    """
    before = _by_row(measured[0]) if measured and measured[0]["step"] == 0 else {}
    after = _by_row(measured[-1]) if measured and measured[-1]["step"] > 0 else {}
    keys = sorted(before.keys() | after.keys(), key=lambda key: (teachers.index(key[0]), *key[1:]))
    nothing: Record = {"fidelity": None, "cosine": None}
    return [
        {
            "teacher": teacher,
            "image_size": size,
            "merged": merged,
            "before": before.get((teacher, size, merged), nothing),
            "after": after.get((teacher, size, merged), nothing),
        }
        for teacher, size, merged in keys
    ]


def _by_row(record: Record) -> dict[tuple[str, int, bool], Record]:
    return {(row["teacher"], row["image_size"], row["merged"]): row for row in record["held_out"]}


def _speed(steps: Sequence[Record]) -> dict[str, Any] | None:
    """Return medians over the logged steps, and the training time they add up to."""
    if not steps:
        return None
    busy: dict[str, list[float]] = {}
    for record in steps:
        for name, seconds in record["busy_seconds"].items():
            busy.setdefault(name, []).append(seconds)
    spans = np.diff([0, *(record["step"] for record in steps)])
    total = sum(record["seconds"] * span for record, span in zip(steps, spans, strict=True))
    return {
        "images_per_second": statistics.median(r["images_per_second"] for r in steps),
        "wait_share": statistics.median(r["wait_share"] for r in steps),
        "seconds": statistics.median(r["seconds"] for r in steps),
        "busy": {name: statistics.median(seconds) for name, seconds in busy.items()},
        "total": duration(float(total)),
    }


def duration(seconds: float) -> str:
    """Return seconds as a person says them: 90 s, 12 min, 3 h 05 min."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60:02d} min"


def _loss_panels(
    steps: Sequence[Record], teachers: Sequence[str], config: Config | None
) -> list[dict[str, str]]:
    """Draw one panel per kind of loss, a line per teacher, a rule where a stage begins."""
    at = [record["step"] for record in steps]
    lengths = [stage.steps for stage in config.stages] if config else []
    starts = [start for start in list(accumulate(lengths))[:-1] if at and start < at[-1]]
    panels = []
    kinds = {loss.rpartition("/")[2] for record in steps for loss in record["losses"]}
    for kind in sorted(kinds, reverse=True):  # summary first
        curves = {
            name: curve(at, [record["losses"].get(f"{name}/{kind}") for record in steps])
            for name in teachers
        }
        panels.append(panel(f"{kind} loss", curves, rules=starts))
    return panels


def _fidelity_panels(measured: Sequence[Record], teachers: Sequence[str]) -> list[dict[str, str]]:
    """Draw unmerged fidelity over steps, one panel per resolution, if measured often enough."""
    if len(measured) < CURVES_FROM:
        return []
    at = [record["step"] for record in measured]
    tables = [_by_row(record) for record in measured]
    panels = []
    for size in sorted({size for table in tables for _, size, _ in table}):
        curves = {}
        for name in teachers:
            rows = [table.get((name, size, False)) for table in tables]
            curves[name] = curve(at, [row["fidelity"] if row else None for row in rows])
        panels.append(panel(f"fidelity at {size} px", curves))
    return panels


def _speed_panels(steps: Sequence[Record], teachers: Sequence[str]) -> list[dict[str, str]]:
    """Draw images per second, share of time waiting, and seconds per step."""
    if not steps:
        return []
    at = [record["step"] for record in steps]
    keys = ("images_per_second", "wait_share", "seconds")
    rate, waiting, whole = (curve(at, [record[key] for record in steps]) for key in keys)
    busy = {
        name: curve(at, [record["busy_seconds"].get(name) for record in steps]) for name in teachers
    }
    percent = waiting[0], [100 * share for share in waiting[1]]
    waits = {
        name: curve(at, [_percent_waited(record, name) for record in steps]) for name in teachers
    }
    return [
        panel("images per second", {"": rate}, bottom=0.0),
        panel("% of time waiting for teachers", {**waits, "": percent}, bottom=0.0, top=100.0),
        panel("seconds per step", {**busy, "": whole}, bottom=0.0),
    ]


def _percent_waited(record: Record, name: str) -> float | None:
    """Return how much of a step the student waited for a teacher; None where nobody noted it."""
    waited = record.get("waits", {}).get(name)
    return None if waited is None else min(100.0, 100 * waited / max(record["seconds"], 1e-9))


def _shown(picture: Picture, teachers: Sequence[str]) -> dict[str, Any]:
    """Return a picture's name, photograph and pairs (teacher, student) as data: addresses."""
    pairs = []
    for name in (name for name in teachers if name in picture.maps):
        target, predicted = picture.maps[name]
        theirs, ours = pca_pictures(target, predicted)
        grid = f"{target.shape[1]} × {target.shape[2]}"
        drawn = {"theirs": data_address(theirs, "PNG"), "ours": data_address(ours, "PNG")}
        pairs.append({"teacher": name, "grid": grid, **drawn})
    photograph = picture.image.detach().cpu().permute(1, 2, 0).numpy()
    return {"name": picture.name, "photograph": data_address(photograph, "JPEG"), "pairs": pairs}
