"""Task `equivariance`: do features follow the picture when it is resized, shifted or tiled?"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor

from radio.encoder.images import nearest_size
from radio.errors import RadioError
from radio.evaluation.features import features_of
from radio.evaluation.pictures import Pictures
from radio.evaluation.result import Options, Result, bootstrap
from radio.evaluation.target import Target
from radio.progress import Report
from radio.targets.grid import to_grid

SHIFTS = (1, 2)  # patches, down and to the right
CHUNK = 16  # pictures whose maps are compared at once
LEAST = 4  # patches along a side, so that a shift leaves something to compare
Maps = Float[Tensor, "n d h w"]
Others = Float[Tensor, "n d rows columns"]
Pair = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class View(Target):
    """A target that shows pictures of another size, in another way, to the one it stands for."""

    def __init__(self, target: Target, how: str, size: int) -> None:
        self.target = target
        self.is_kept = target.is_kept
        name = f"{target.name} ({how})"
        fingerprint = hashlib.sha256(f"{target.fingerprint} {how}".encode()).hexdigest()
        super().__init__(name, fingerprint, target.names, native_size=size, patch=target.patch)


class Cropped(View):
    """Shows a square of `size` px that lies `offset` patches down and right in a larger picture.

    The picture is `size` and the largest shift.
    """

    def __init__(self, target: Target, size: int, offset: int) -> None:
        start = offset * target.patch
        self.part = slice(start, start + size)
        super().__init__(target, f"crop {start}+{size}", size + max(SHIFTS) * target.patch)

    def extract(
        self, images: UInt8[Tensor, "batch 3 h w"], names: Sequence[str]
    ) -> dict[str, Tensor]:
        """Return the target's features of the crops."""
        return self.target.extract(images[:, :, self.part, self.part].contiguous(), names)


class Tiled(View):
    """Shows the four quarters of a picture one by one, and lays their maps side by side."""

    def __init__(self, target: Target, tile: int) -> None:
        super().__init__(target, f"tiles of {tile}", 2 * tile)

    def extract(
        self, images: UInt8[Tensor, "batch 3 h w"], names: Sequence[str]
    ) -> dict[str, Tensor]:
        """Return maps twice as high and wide as a tile's."""
        tiles = [tile for row in images.chunk(2, dim=2) for tile in row.chunk(2, dim=3)]
        joined = {}
        for name, maps in self.target.extract(torch.cat(tiles), names).items():
            a, b, c, d = maps.chunk(4)
            joined[name] = torch.cat([torch.cat([a, b], 3), torch.cat([c, d], 3)], 2)
        return joined


@dataclass(frozen=True)
class Row:
    """What two ways to features of the same places differ by, per picture: 1 - cos, mean over them.

    `centred` is after each side's mean over data set and positions is taken off, `raw` as it is.
    """

    kind: str
    what: dict[str, int]
    raw: np.ndarray
    centred: np.ndarray

    @property
    def in_score(self) -> bool:
        """Whether the target's own equivariance is measured, rather than what tiling does to it."""
        return self.kind in ("scale", "shift")

    def as_dict(self, seed: int) -> dict[str, Any]:
        """Return the row for JSON, with the interval of the centred error."""
        return {
            "kind": self.kind,
            **self.what,
            "centred": float(self.centred.mean()),
            "interval": list(bootstrap(self.centred, seed=seed)),
            "raw": float(self.raw.mean()),
            "in_score": self.in_score,
        }


def equivariance(
    target: Target, data: Pictures, options: Options, progress: Report | None = None
) -> Result:
    """Measure 1 - cos(f(g x), g f(x)) on val pictures; the score is the mean of the scored rows.

    Rows (RADIOv2.5, 2412.07679, finding 1), each centred and raw; the score is of the centred:
        scale        g resizes the largest of `options.sizes` to each other one, maps by antialiased
                     bilinear (scored)
        shift        g moves the picture by 1 and 2 whole patches inside a larger one; compared
                     where both crops see (scored)
        tiles        f of the whole at twice the smallest size, against f of its four quarters
        tiled_scale  as scale, from the four quarters to the smallest size

    Sizes are the native one and its half if none are given. A single size leaves out `scale`.

    Raises:
        RadioError: a target that takes only its native size and is asked for others, no map of
            that name, or a size that is too small.
    """
    name = _feature(target, options)
    sizes = _sizes(target, options.sizes)
    split = data.split("val")
    views = _views(target, sizes)
    maps: dict[str, Tensor] = {}
    for number, (key, (view, size)) in enumerate(views.items()):
        report = _share(progress, number, len(views))
        maps[key] = features_of(view, split, name, size, report)
    rows = list(_rows(maps, sizes, target.patch))
    scored = np.stack([row.centred for row in rows if row.in_score]).mean(axis=0)
    return Result(
        "equivariance",
        target.name,
        float(scored.mean()),
        bootstrap(scored, seed=options.seed),
        {
            "score_is": "mean error of scale and shift rows",
            "by_kind": {kind: _mean(rows, kind) for kind in dict.fromkeys(r.kind for r in rows)},
            "rows": [row.as_dict(options.seed) for row in rows],
            "features": name,
            "sizes": list(sizes),
            "pictures": len(split),
        },
        scored,
    )


def _mean(rows: Sequence[Row], kind: str) -> float:
    return float(np.mean([row.centred.mean() for row in rows if row.kind == kind]))


def _views(target: Target, sizes: tuple[int, ...]) -> dict[str, tuple[Target, int]]:
    """Return by key who is shown the pictures, and at which size."""
    large, small = max(sizes), min(sizes)
    views: dict[str, tuple[Target, int]] = {f"{size}": (target, size) for size in sizes}
    if target.takes_any_size:
        views[f"{2 * small}"] = (target, 2 * small)
    tiled = Tiled(target, small)
    views["tiled"] = (tiled, tiled.native_size)
    for offset in (0, *SHIFTS):
        cropped = Cropped(target, large, offset)
        views[f"crop {offset}"] = (cropped, cropped.native_size)
    return views


def _rows(maps: dict[str, Maps], sizes: tuple[int, ...], patch: int) -> Iterator[Row]:
    large, small = max(sizes), min(sizes)
    for size in sorted(sizes, reverse=True)[1:]:
        yield _row(
            "scale", {"from": large, "to": size}, maps[f"{large}"], maps[f"{size}"], _smaller
        )
    finer = maps["crop 0"].shape[-1] // (large // patch)  # positions along a patch's side
    for shift in SHIFTS:
        pair = _common(shift * finer)
        what = {"size": large, "patches": shift}
        yield _row("shift", what, maps["crop 0"], maps[f"crop {shift}"], pair)
    what = {"from": 2 * small, "to": small}
    if f"{2 * small}" in maps:
        yield _row("tiles", {"size": 2 * small}, maps[f"{2 * small}"], maps["tiled"], _smaller)
    yield _row("tiled_scale", what, maps["tiled"], maps[f"{small}"], _smaller)


def _row(kind: str, what: dict[str, int], first: Maps, second: Others, pair: Pair) -> Row:
    return Row(kind, what, *errors(first, second, pair))


def _smaller(large: Maps, small: Others) -> tuple[Others, Others]:
    return to_grid(large, (small.shape[-2], small.shape[-1])), small


def _common(shift: int) -> Pair:
    def pair(still: Maps, moved: Maps) -> tuple[Others, Others]:
        rows, columns = moved.shape[-2] - shift, moved.shape[-1] - shift
        return still[:, :, shift:, shift:], moved[:, :, :rows, :columns]

    return pair


def errors(
    first: Maps, second: Others, pair: Pair
) -> tuple[Float[np.ndarray, " n"], Float[np.ndarray, " n"]]:
    """Return 1 - cos of maps, raw and centred: the mean over positions, per picture, in float64.

    `pair` brings some pictures' maps of both kinds to the same positions. Centred means less the
    mean over all pictures and positions of what it gives, each side its own.
    """
    means = [
        torch.cat(parts).mean(dim=0) for parts in zip(*_means(first, second, pair), strict=True)
    ]
    centres = [mean[None, :, None, None] for mean in means]
    raw, centred = [], []
    for a, b in _pairs(first, second, pair):
        raw.append(_distance(a, b))
        centred.append(_distance(a - centres[0], b - centres[1]))
    return torch.cat(raw).numpy(), torch.cat(centred).numpy()


def _pairs(first: Maps, second: Others, pair: Pair) -> Iterator[tuple[Tensor, Tensor]]:
    for start in range(0, len(first), CHUNK):
        part = slice(start, start + CHUNK)
        a, b = pair(first[part].float(), second[part].float())
        yield a.double(), b.double()


def _means(first: Maps, second: Others, pair: Pair) -> Iterator[tuple[Tensor, Tensor]]:
    for a, b in _pairs(first, second, pair):
        yield a.mean(dim=(2, 3)), b.mean(dim=(2, 3))


def _distance(a: Tensor, b: Tensor) -> Float[Tensor, " n"]:
    return (1 - F.cosine_similarity(a, b, dim=1)).mean(dim=(1, 2))


def _feature(target: Target, options: Options) -> str:
    name = options.features or target.output("features", options.adaptor)
    target.check(name)
    if not name.endswith("features"):
        raise RadioError(f"'{name}' is no map, so nothing can be shifted or resized in it")
    return name


def _sizes(target: Target, asked: tuple[int, ...] | None) -> tuple[int, ...]:
    """Return the sizes to compare, the native one and its half if none are asked for."""
    native = target.native_size
    sizes = asked
    if sizes is None:
        sizes = (native, nearest_size(native // 2, native // 2, target.patch)[0])
    if not target.takes_any_size and set(sizes) != {native}:
        raise RadioError(
            f"'{target.name}' takes only its native {native} px, so nothing is to be resized; "
            f"--sizes {native} measures shifts and tiles alone"
        )
    if max(sizes) < LEAST * target.patch:
        raise RadioError(
            f"{max(sizes)} px are fewer than {LEAST} patches of {target.patch} px; give larger "
            "--sizes"
        )
    return tuple(sorted(set(sizes), reverse=True))


def _share(progress: Report | None, number: int, parts: int) -> Report | None:
    if progress is None:
        return None
    return lambda done, total: progress(number * total + done, parts * total)
