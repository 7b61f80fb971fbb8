"""Label maps of a data folder as positions in the classes that are scored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import UInt8

from radio.errors import RadioError
from radio.evaluation.labelled import chosen_classes
from radio.evaluation.pictures import CLASSES, Pictures, Split
from radio.evaluation.result import Options

IGNORED = 255  # in the maps that are returned, and in a file unless it is a class there
IGNORE_KIND = "ignore"  # what classes.txt says of a value that is not scored
SEMANTIC, PLAIN = "sem.png", "png"
Map = UInt8[np.ndarray, "_ _"]  # each of its own size


@dataclass(frozen=True)
class LabelMaps:
    """Both splits' maps, whose values are positions in `classes` or IGNORED.

    `ignored` are the files' values that are not scored.
    """

    classes: tuple[int, ...]
    names: tuple[str, ...]
    ignored: tuple[int, ...]
    train: list[Map]
    val: list[Map]


def label_maps(data: Pictures, options: Options) -> LabelMaps:
    """Read the label maps of both splits: `sem.png` where there is one, else `png`.

    Not scored are the value 255 if it is no class, `options.ignore`, and without that the rows of
    classes.txt of kind `ignore`; with `options.classes` every other class too.

    Raises:
        RadioError: no classes.txt, no maps or instance maps only, a value that is no class, or a
            class of `options.classes` that a split lacks.
    """
    if not data.classes:
        raise RadioError(
            f"{data.folder} has no {CLASSES}; segmentation needs one: a number, a name, and "
            f"'{IGNORE_KIND}' behind what is not scored, with tabs between"
        )
    ignored = _ignored(data, options.ignore)
    known = set(data.classes) | set(ignored)
    train, val = (_read(data.split(name), known) for name in ("train", "val"))
    seen = [
        torch.from_numpy(np.unique(np.concatenate([m.ravel() for m in s]))) for s in (train, val)
    ]
    wanted = chosen_classes(data, options.classes, seen)
    classes = tuple(number for number in wanted if number not in ignored)
    if len(classes) < 2:
        raise RadioError(
            f"{len(classes)} class is left to score ({classes}); expected two or more that are "
            "not ignored"
        )
    table = np.full(256, IGNORED, dtype=np.uint8)
    table[list(classes)] = np.arange(len(classes))
    names = tuple(data.classes[number] for number in classes)
    return LabelMaps(classes, names, ignored, [table[m] for m in train], [table[m] for m in val])


def _ignored(data: Pictures, asked: int | None) -> tuple[int, ...]:
    """Return the values of a file that are not scored."""
    if asked is not None:
        marked = {asked}
    else:
        marked = {number for number, kind in data.class_kinds.items() if kind == IGNORE_KIND}
    return tuple(sorted(marked | ({IGNORED} - set(data.classes))))


def _read(split: Split, known: set[int]) -> list[Map]:
    field = SEMANTIC if split.has(SEMANTIC) else PLAIN
    if field == PLAIN and split.has("instances"):
        _refuse_instance_maps(split)
    maps = [split.label_map(at, field) for at in range(len(split))]
    for key, found in zip(split.keys, maps, strict=True):
        if unknown := sorted(set(np.unique(found).tolist()) - known):
            raise RadioError(
                f"{split.name}, sample '{key}': its {field} has the value {unknown[0]}, which is "
                f"neither a class of {CLASSES} nor ignored ({_values(known)}); give --ignore"
            )
    return maps


def _refuse_instance_maps(split: Split) -> None:
    """Refuse maps of instances, whose values would be read as classes."""
    for at, key in enumerate(split.keys):
        for entry in split.instances(at):
            if entry.get("id") != entry.get("class"):
                raise RadioError(
                    f"{split.name}, sample '{key}': its {PLAIN} is a map of instances (instance "
                    f"{entry.get('id')} is of class {entry.get('class')}); segmentation needs "
                    f"maps of classes, {SEMANTIC}"
                )


def _values(known: Sequence[int] | set[int]) -> str:
    return f"{min(known)} to {max(known)}"
