"""Pictures with class numbers for the tasks that learn from `train` and are scored on `val`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from radio.errors import RadioError
from radio.evaluation.features import features_of
from radio.evaluation.pictures import CLASSES, Pictures, Split
from radio.evaluation.result import Options
from radio.evaluation.target import Target
from radio.progress import Report


@dataclass(frozen=True)
class Labelled:
    """Summaries of both splits, labels as positions in `classes` (numbers of classes.txt)."""

    classes: tuple[int, ...]
    names: tuple[str, ...]
    train: Float[Tensor, "train dim"]
    train_labels: Int[Tensor, " train"]
    val: Float[Tensor, "val dim"]
    val_labels: Int[Tensor, " val"]


def labelled(
    target: Target, data: Pictures, options: Options, progress: Report | None = None
) -> Labelled:
    """Return what a classifier learns from and is scored on, both among `options.classes`.

    Without `options.classes` the classes are those of the train split. The output is
    `options.features`; maps are averaged over their positions.

    Raises:
        RadioError: a class that classes.txt or a split lacks.
    """
    name = options.features or "summary"
    target.check(name)
    train, val = data.split("train"), data.split("val")
    train_labels, val_labels = train.labels(), val.labels()
    classes = chosen_classes(data, options.classes, (train_labels, val_labels))
    if options.classes is None:
        seen = set(train_labels.tolist())
        classes = tuple(number for number in classes if number in seen)
        _refuse_unlearnt(data, sorted(set(val_labels.tolist()) - seen))
    found = [
        _rows(target, split, name, labels, classes, options, progress)
        for split, labels in ((train, train_labels), (val, val_labels))
    ]
    names = tuple(data.classes[number] for number in classes)
    return Labelled(classes, names, *found[0], *found[1])


def chosen_classes(
    data: Pictures, wanted: Sequence[int] | None, labels: Sequence[Tensor]
) -> tuple[int, ...]:
    """Return the wanted classes' numbers, all of classes.txt if none are named.

    Args:
        labels: [n] of each split in which every wanted class needs a picture.

    Raises:
        RadioError: a wanted class that classes.txt lacks, or that has no picture.
    """
    if wanted is None:
        return tuple(data.classes)
    unknown = sorted(set(wanted) - set(data.classes))
    if unknown:
        raise RadioError(
            f"class {', '.join(map(str, unknown))} is not in {data.folder / CLASSES}; expected "
            f"numbers of {min(data.classes)} to {max(data.classes)}"
        )
    for found in labels:
        empty = sorted(set(wanted) - set(found.tolist()))
        if empty:
            raise RadioError(
                f"{_named(data, empty)} of {data.folder} has no picture in one of the splits; "
                "leave it out of the classes to score"
            )
    return tuple(wanted)


def among(labels: Int[Tensor, " n"], classes: Sequence[int]) -> Bool[Tensor, " n"]:
    """Return which labels are of these classes."""
    return torch.isin(labels, torch.tensor(list(classes)))


def per_class(
    hits: Float[np.ndarray, " n"], labels: Int[Tensor, " n"], names: Sequence[str]
) -> dict[str, float]:
    """Return the mean hit of every class that has a picture; `labels` are positions in `names`.

    Classes of one name are told apart by their position.
    """
    twice = {name for name in names if list(names).count(name) > 1}
    found: dict[str, float] = {}
    for at, name in enumerate(names):
        rows = (labels == at).numpy()
        if rows.any():
            found[f"{name} ({at})" if name in twice else name] = float(hits[rows].mean())
    return found


def _rows(
    target: Target,
    split: Split,
    name: str,
    labels: Int[Tensor, " n"],
    classes: Sequence[int],
    options: Options,
    progress: Report | None,
) -> tuple[Tensor, Tensor]:
    values = pooled(features_of(target, split, name, options.size, progress))
    rows = among(labels, classes)
    place = {number: at for at, number in enumerate(classes)}
    places = torch.tensor([place[number] for number in labels[rows].tolist()], dtype=torch.long)
    return (values if bool(rows.all()) else values[rows]), places


def pooled(values: Float[Tensor, "n dim *grid"]) -> Float[Tensor, "n dim"]:
    """Return summaries as they are, and maps averaged over their positions."""
    return values.flatten(2).mean(dim=2) if values.ndim > 2 else values


def _refuse_unlearnt(data: Pictures, numbers: Sequence[int]) -> None:
    if numbers:
        raise RadioError(
            f"{_named(data, numbers)} is scored but has no train picture in {data.folder}; give "
            "the classes to score"
        )


def _named(data: Pictures, numbers: Sequence[int]) -> str:
    shown = ", ".join(f"{number} ({data.classes[number]})" for number in numbers[:5])
    return f"class {shown}" + (f" and {len(numbers) - 5} more" if len(numbers) > 5 else "")
