"""Task `mode-switch`: what an encoder explains of each teacher at every size in between."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from radio.config import TeacherConfig
from radio.data.mosaic import Mosaic
from radio.encoder.images import nearest_size, resized
from radio.encoder.same_teacher import check_fingerprint
from radio.errors import RadioError
from radio.evaluation.features import features_of
from radio.evaluation.pictures import Pictures, Split
from radio.evaluation.result import Options, Result, bootstrap
from radio.evaluation.target import Target
from radio.evaluation.target_kinds import TeacherTarget
from radio.progress import Report
from radio.targets.grid import Grid, to_coarser
from radio.training.metrics import Fidelity
from teachers import Teacher

BATCH = 16  # pictures through the encoder and its teachers at once
LITTLE = 0.1  # a largest e below this says too little for a ratio to mean much
NEEDED = ("kind", "options", "pretrained", "seed")  # of a teacher, in the encoder's config.json
Maps = Float[Tensor, "n d h w"]
Values = Float[np.ndarray, "pictures teachers sizes 2"]


def mode_switch(
    target: Target, data: Pictures, options: Options, progress: Report | None = None
) -> Result:
    """Measure e(r) = 1 - 1 / fidelity per teacher at every patch step; score: worst min e / max e.

    Fidelity is sum (y - mean y)^2 / sum (p - y)^2 over the val pictures' features y of a teacher
    and the encoder's p (PHI-S, 2410.01680), in the teacher's own space; PHI-S is a rotation times
    a scalar, so its standardized space gives the same. e is the share of the teacher's variance
    that is explained: 1 is all, 0 no more than the mean. A switch of modes between the training
    sizes (RADIOv2.5, 2412.07679, finding 2) is a hole in the curve.

    Teachers see each picture as in training: at the size whose grid is the encoder's where they
    take any (view mode `match`); at the encoder's own size on a full canvas, with other pictures
    around it, where they take mosaics and the picture is smaller than the canvas; at their native
    size else. Both maps then go to the coarser grid. SAM says other things of a picture in half its
    size, and of one with nothing around it, so that its native features, or canvases with grey
    where no whole picture fits, would tear holes into the curve, whatever the encoder does. Sizes
    run from the smallest to the largest of `options.sizes`; from half the native size if not given.
    The interval weighs pictures, the mean staying that of all.

    Raises:
        RadioError: the target is no encoder, its folder does not say how to build a teacher, the
            teacher's weights are others than those it was distilled from, or a size is no multiple
            of the patch.
    """
    teachers = teachers_of(target, options.adaptor)
    sizes = _sizes(target, options.sizes)
    split = data.split("val")
    fixed = [name for name, teacher in teachers.items() if not teacher.takes_any_size]
    reports = _reports(progress, len(sizes) + len(fixed))
    native = {
        name: features_of(teachers[name], split, "features", progress=next(reports))
        for name in fixed
    }
    columns = [_at_size(target, teachers, native, split, size, next(reports)) for size in sizes]
    values = np.stack(columns, axis=2)
    details = {
        "score_is": "min over teachers of min e / max e",
        "curve": {
            "label": "px",
            "x": list(sizes),
            "y": dict(zip(teachers, explained(values).tolist(), strict=True)),
            "value": "e = 1 - 1 / fidelity",
        },
        "teachers": {
            name: _details(teacher, values[:, [row]], options.seed)
            for row, (name, teacher) in enumerate(teachers.items())
        },
        "pictures": len(split),
    }
    return Result(
        "mode-switch",
        target.name,
        worst_ratio(values),
        bootstrap(values, worst_ratio, seed=options.seed),
        details,
        values,
    )


def explained(values: np.ndarray) -> np.ndarray:
    """Return e = 1 - sum (p - y)^2 / sum (y - mean y)^2 [teachers, sizes] of sums by picture.

    The two sums are the last axis of [pictures, teachers, sizes, 2].
    """
    spread, residual = np.moveaxis(values.sum(axis=0), -1, 0)
    return np.asarray(1 - residual / spread)


def worst_ratio(values: np.ndarray) -> float:
    """Return min over teachers of min e / max e."""
    return min(_ratio(curve) for curve in explained(values))


def _ratio(curve: np.ndarray) -> float:
    """Return min e / max e, and 0 where nothing is explained at any size."""
    low, high = float(curve.min()), float(curve.max())
    return low / high if high > 0 else 0.0


def _details(teacher: TeacherTarget, values: Values, seed: int) -> dict[str, Any]:
    """Return what is told of one teacher, whose values are [pictures, 1, sizes, 2]."""
    curve = explained(values)[0]
    best = float(curve.max())
    shown = mode_at(teacher.teacher, (1, 1))  # below its native size, where it has one
    found: dict[str, Any] = {
        "e": curve.tolist(),
        "min": float(curve.min()),
        "max": best,
        "min_over_max": worst_ratio(values),
        "interval": list(bootstrap(values, worst_ratio, seed=seed)),
        "shown": shown,
    }
    if best < LITTLE:
        found["warning"] = (
            f"at most {best:.3f} of the variance is explained, less than {LITTLE}: the ratio says "
            "little"
        )
    return found


def teachers_of(target: Target, adaptor: str | None = None) -> dict[str, TeacherTarget]:
    """Build the teachers whose features an encoder predicts, all of them or the one named.

    Raises:
        RadioError: no encoder, no such adaptor, or a teacher that is not the one of its fusing.
    """
    having = [name for name in target.facts if f"{name}:features" in target.names]
    if not having:
        raise RadioError(
            f"'{target.name}' predicts no teacher's features; expected an encoder with feature "
            "adaptors, or a run"
        )
    if adaptor is not None and adaptor not in having:
        raise RadioError(
            f"'{target.name}' has no adaptor '{adaptor}' for features; it has: {', '.join(having)}"
        )
    return {name: _build(target, name) for name in having if adaptor in (None, name)}


def _build(target: Target, name: str) -> TeacherTarget:
    facts = target.facts[name]
    missing = [key for key in NEEDED if key not in facts]
    if missing:
        raise RadioError(
            f"'{target.name}' does not say how to build the teacher '{name}': its config.json has "
            f"no {', '.join(missing)}; fuse its run anew with `radio fuse RUN FOLDER`, or name "
            "another with --adaptor"
        )
    config = TeacherConfig(facts["kind"], dict(facts["options"]), facts["pretrained"])
    teacher = TeacherTarget(name, config, int(facts["seed"]))
    check_fingerprint(name, facts, teacher.fingerprint, f"'{target.name}'")
    return teacher


def _at_size(
    target: Target,
    teachers: Mapping[str, TeacherTarget],
    native: Mapping[str, Maps],
    split: Split,
    size: int,
    report: Report | None,
) -> Float[np.ndarray, "pictures teachers 2"]:
    """Return spread and residual of every picture and teacher at one size of the encoder's."""
    sums = {name: Fidelity() for name in teachers}
    outputs = {name: f"{name}:features" for name in teachers}
    for start in range(0, len(split), BATCH):
        part = range(start, min(start + BATCH, len(split)))
        found = target.extract(_shown(split, part, (size, size)), list(outputs.values()))
        for name, teacher in teachers.items():
            predicted = found[outputs[name]]
            if mode_at(teacher.teacher, _grid(predicted)) == "native":
                y = native[name][part.start : part.stop]
            else:
                y = matched(teacher, _grid(predicted), split, part)
            sums[name].update(*to_coarser(predicted, y))
        if report is not None:
            report(part.stop, len(split))
    values = {name: several.by_view() for name, several in sums.items()}
    for name, value in values.items():
        _check(name, size, value)
    return torch.stack(list(values.values()), dim=1).numpy()


def mode_at(teacher: Teacher, grid: Grid) -> str:
    """Return the view mode in which a teacher is held against predictions on a grid."""
    if teacher.takes_any_size:
        return "match"
    fits = max(grid) * teacher.stride < teacher.native_size
    return "mosaic" if fits and "mosaic" in teacher.view_modes else "native"


def matched(target: TeacherTarget, grid: Grid, split: Split, part: range) -> Maps:
    """Return what a teacher says of pictures that have as many strides as the grid positions.

    One of a fixed size sees them on full canvases.
    """
    teacher, (height, width) = target.teacher, (side * target.patch for side in grid)
    pixels = target.normalised(_shown(split, part, (height, width)))
    if teacher.takes_any_size:
        features: Maps = teacher(pixels).features
    else:
        mosaic = Mosaic(teacher.native_size, height, teacher.stride)
        features = mosaic.split(teacher(full_canvases(mosaic, pixels)).features, len(pixels))
    return features.float().cpu()


def full_canvases(
    mosaic: Mosaic, views: Float[Tensor, "b c view view"]
) -> Float[Tensor, "canvases c canvas canvas"]:
    """Return a mosaic's canvases with the views that come next, cut, where it has nothing."""
    side, along = mosaic.canvas_px, -(-mosaic.canvas_px // mosaic.view_px)
    canvases, is_free = mosaic.place(views), mosaic.place(torch.ones_like(views)) == 0
    for number, canvas in enumerate(canvases):
        first = number * mosaic.views_per_canvas
        behind = [views[(first + at) % len(views)] for at in range(along**2)]
        rows = [torch.cat(behind[at : at + along], dim=2) for at in range(0, along**2, along)]
        full = torch.cat(rows, dim=1)[:, :side, :side]
        canvas[is_free[number]] = full[is_free[number]]
    return canvases


def _shown(split: Split, part: Sequence[int], size: Grid) -> Tensor:
    return torch.stack([resized(split.picture(index), 1, size) for index in part])


def _check(name: str, size: int, values: Float[Tensor, "pictures 2"]) -> None:
    if not bool(torch.isfinite(values).all()) or not float(values[:, 0].sum()) > 0:
        raise RadioError(
            f"the features of teacher '{name}', or what is said of them at {size} px, are not "
            "finite or the same everywhere, so no share of them can be explained"
        )


def _sizes(target: Target, asked: Sequence[int] | None) -> tuple[int, ...]:
    """Return every multiple of the patch from the smallest to the largest size."""
    native, patch = target.native_size, target.patch
    ends = asked or (nearest_size(native // 2, native // 2, patch)[0], native)
    for size in ends:
        target.checked_size(size)
    if min(ends) == max(ends):
        raise RadioError(f"--sizes are {list(ends)}; a curve needs a smaller and a larger one")
    return tuple(range(min(ends), max(ends) + 1, patch))


def _reports(progress: Report | None, parts: int) -> Iterator[Report | None]:
    """Yield a report for each part of a work, all parts being as long."""
    for number in range(parts):
        yield None if progress is None else _part(progress, number, parts)


def _part(progress: Report, number: int, parts: int) -> Report:
    return lambda done, total: progress(number * total + done, parts * total)


def _grid(maps: Maps) -> Grid:
    return maps.shape[-2], maps.shape[-1]
