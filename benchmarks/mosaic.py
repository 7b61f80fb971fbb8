"""What a mosaic costs and what it changes, beside the other ways to show SAM a small view.

    python -m benchmarks.mosaic [--teacher sam_b] [--pretrained FILE] [--sizes 256 432 512]
                                [--images FOLDER] [--rounds 4]

Seconds of a teacher's target per student image, as a run's own TargetMaker makes it:

- native: the view at the teacher's own size, one pass for each;
- mosaic: k x k views on one canvas, one pass for all of them;
- padded: the view alone on a canvas, one pass for each;
- match: the view at its own size, by interpolated positions. SAM's teacher does not offer that, so
  it is made here, from the same weights: the rival that costs about as much as a mosaic.

Every round runs all of them, in another order, and is compared within itself; figures are medians.
The error is the squared difference from the native features of the same picture, resized to the
view's grid, over the variance of those: 0 is native, 1 is no better than their mean. A round's
pictures under test lie on other tiles than in the round before, among other photographs; a tile's
figure is over the same pictures' mean. Without --pretrained the weights are random: costs are what
they are, errors are about a random network.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.record import write
from radio.config import DataConfig, load_teacher
from radio.data.mosaic import Mosaic
from radio.data.photographs import CREDITS, photograph
from radio.data.plan import PartitionSpec, ViewSpec
from radio.data.shards import ImageSource, open_images
from radio.data.views import ViewReader
from radio.targets.codec import decode
from radio.targets.grid import to_grid
from radio.targets.target_maker import Request, TargetMaker
from teachers import Teacher, build_teacher
from teachers.sam import SamTeacher

NAME = "sam"  # the teacher's name in the run
REQUEST = Request("train", "float32", {})  # features as they are, unrounded
THREADS = 2
LEEWAY = 1.1  # of a mosaic over native, beside 1 / k^2


@dataclass(frozen=True)
class Shot:
    """One timed call: its seconds, and the features of the pictures under test by their tile."""

    seconds: float
    features: dict[tuple[int, int], Tensor]  # by (tile, picture)


Shots = dict[tuple[str, int], dict[int, Shot]]  # by (mode, size) and round


class Bench:
    """A teacher shown the same pictures in every way."""

    def __init__(self, teacher: Teacher, source: ImageSource, rounds: int) -> None:
        if len(source) < rounds:
            raise SystemExit(f"{rounds} rounds need {rounds} pictures, --images has {len(source)}")
        self.teacher, self.rounds, self.num_pictures = teacher, rounds, len(source)
        self.readers = {"train": ViewReader(source, 0, None)}  # whole pictures' centred squares
        self.maker = self.maker_of(teacher)
        self.matching: dict[int, TargetMaker] = {}

    def maker_of(self, teacher: Teacher) -> TargetMaker:
        micro_batch, device = DataConfig(train="").micro_batch, torch.device("cpu")
        return TargetMaker(NAME, "sam", teacher, self.readers, teacher.stride, micro_batch, device)

    def run(self, mode: str, size: int, round_: int) -> Shot:
        """Time one call of a mode for views of `size` px."""
        samples = [round_ % self.rounds]
        if mode == "mosaic":
            samples = self.canvas(size, round_)
        maker = self.maker
        if mode == "match" and not self.teacher.takes_any_size:
            maker, mode = self.matching[size], "native"
        views = tuple(ViewSpec(sample, 0, sample) for sample in samples)
        spec = PartitionSpec(mode, size, views, {NAME: mode}, tuple(range(len(views))))
        started = time.perf_counter()
        coded = maker(spec, REQUEST)
        seconds = time.perf_counter() - started
        features = decode(coded.features, "float32")
        tested = [(tile, sample) for tile, sample in enumerate(samples) if sample < self.rounds]
        return Shot(seconds, {(tile, sample): features[tile] for tile, sample in tested})

    def canvas(self, size: int, round_: int) -> list[int]:
        """Return the pictures of a canvas by tile: those under test, and others around them.

        Those under test are spread evenly, and move by a row and a column from round to round.
        """
        k = Mosaic(self.teacher.native_size, size, self.teacher.stride).per_side
        others = list(range(self.rounds, self.num_pictures)) or list(range(self.rounds))
        tiles = [others[tile % len(others)] for tile in range(k * k)]
        for picture in range(min(self.rounds, k * k)):
            tile = (picture * max(1, k * k // self.rounds) + round_ * (k + 1)) % (k * k)
            tiles[tile] = (picture + (round_ if k == 1 else 0)) % self.rounds
        return tiles

    def prepare(self, sizes: Sequence[int]) -> None:
        """Make the teachers of mode match, decode every picture, and run once what is timed."""
        if not self.teacher.takes_any_size:
            self.matching = {size: self.maker_of(resized(self.teacher, size)) for size in sizes}
        everything = tuple(ViewSpec(sample, 0, sample) for sample in range(self.num_pictures))
        self.readers["train"].batch(everything, self.teacher.stride)
        for size in sizes:
            self.run("match", size, 0)


def resized(teacher: Teacher, size: int) -> Teacher:
    """Return SAM at another size: its own weights, its position table resized (bicubic).

    Relative positions need nothing: segment_anything resizes them to whatever grid it meets.
    """
    if not isinstance(teacher, SamTeacher):
        raise SystemExit(f"mode match of a {type(teacher).__name__} is not known here")
    encoder = copy.copy(teacher.encoder)  # shares every weight but the table
    table = teacher.encoder.pos_embed.movedim(-1, 1)
    side = size // teacher.stride
    table = F.interpolate(table, size=(side, side), mode="bicubic", antialias=True)
    positions = nn.Parameter(table.movedim(1, -1), requires_grad=False)
    encoder._parameters = {**encoder._parameters, "pos_embed": positions}
    encoder.img_size = size
    matching = SamTeacher(teacher.name, encoder, teacher.stride, teacher.feature_dim)
    return matching.prepared("sam", {"image_size": size})


def measure(bench: Bench, sizes: Sequence[int]) -> dict:
    native_size = bench.teacher.native_size
    shots: Shots = defaultdict(dict)
    for round_ in range(bench.rounds):
        # A padded pass costs the same whatever lies on the canvas, so sizes take turns.
        jobs = [("native", native_size), ("padded", sizes[round_ % len(sizes)])]
        jobs += [(mode, size) for size in sizes for mode in ("mosaic", "match")]
        for mode, size in jobs[round_ % len(jobs) :] + jobs[: round_ % len(jobs)]:
            shots[mode, size][round_] = bench.run(mode, size, round_)
            seconds = shots[mode, size][round_].seconds
            print(f"round {round_}: {mode} {size} px, {seconds:.2f} s", file=sys.stderr)
    native = {round_: shot.seconds for round_, shot in shots["native", native_size].items()}
    whole = [shot.features[0, number] for number, shot in shots["native", native_size].items()]
    return {
        "native_seconds": statistics.median(native.values()),
        "sizes": {
            str(size): of_size(bench.teacher, size, shots, native, torch.stack(whole))
            for size in sizes
        },
    }


def of_size(
    teacher: Teacher, size: int, shots: Shots, native: dict[int, float], whole: Tensor
) -> dict:
    """Return a view size's figures; `whole` [pictures, d, H, W] is what native says."""
    mosaic = Mosaic(teacher.native_size, size, teacher.stride)
    wanted = to_grid(whole, (size // teacher.stride, size // teacher.stride))
    seconds, over_native, error = {}, {}, {}
    for mode in ("mosaic", "padded", "match"):
        rounds = shots[mode, size]
        if not rounds:  # fewer rounds than sizes leave some of them without a padded pass
            continue
        share = mosaic.views_per_canvas if mode == "mosaic" else 1
        each = {round_: shot.seconds / share for round_, shot in rounds.items()}
        seconds[mode] = statistics.median(each.values())
        over_native[mode] = statistics.median(each[r] / native[r] for r in rounds)
        found = [value for _, _, value in errors(rounds, wanted)]
        error[mode] = {"mean": statistics.fmean(found), "views": len(found)}
    bound = LEEWAY / mosaic.views_per_canvas
    return {
        "per_side": mosaic.per_side,
        "views_per_canvas": mosaic.views_per_canvas,
        "seconds_per_student_image": seconds,
        "over_native": over_native,
        "mosaic_bound": bound,
        "mosaic_within_bound": over_native["mosaic"] <= bound,
        "error": error,
        "error_by_tile": by_tile(errors(shots["mosaic", size], wanted), mosaic.per_side),
    }


def errors(rounds: dict[int, Shot], wanted: Tensor) -> list[tuple[int, int, float]]:
    """Return (tile, picture, error) of every picture under test."""
    variance = (wanted - wanted.mean((0, 2, 3), keepdim=True)).square().mean()
    return [
        (tile, picture, float((features - wanted[picture]).square().mean() / variance))
        for shot in rounds.values()
        for (tile, picture), features in shot.features.items()
    ]


def by_tile(found: list[tuple[int, int, float]], k: int) -> list[list[float | None]]:
    """Return rows of tiles, each the mean error over that of the same picture on all its tiles."""
    of_picture: dict[int, list[float]] = defaultdict(list)
    for _, picture, error in found:
        of_picture[picture].append(error)
    on_tile: dict[int, list[float]] = defaultdict(list)
    for tile, picture, error in found:
        on_tile[tile].append(error / statistics.fmean(of_picture[picture]))
    means = [statistics.fmean(on_tile[t]) if t in on_tile else None for t in range(k * k)]
    return [means[k * row : k * row + k] for row in range(k)]


def open_pictures(images: Path | None, folder: Path) -> ImageSource:
    if images is not None:
        return open_images(images)
    for name in CREDITS:
        photograph(name).save(folder / f"{Path(name).stem}.png")
    return open_images(folder)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--teacher", default="sam_b")
    parser.add_argument("--pretrained", help="a file or tag; without it weights are random")
    parser.add_argument("--sizes", type=int, nargs="+", default=[256, 432, 512])
    parser.add_argument("--images", type=Path, help="a folder; without it the demo's photographs")
    parser.add_argument("--rounds", type=int, default=4)
    arguments = parser.parse_args()
    torch.set_num_threads(THREADS)
    card = load_teacher(arguments.teacher)
    options = dict(card.options)
    teacher = build_teacher(card.kind, NAME, options, arguments.pretrained, seed=0)
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(teacher, open_pictures(arguments.images, Path(folder)), arguments.rounds)
        bench.prepare(arguments.sizes)
        figures = measure(bench, arguments.sizes)
    random = "random (seed 0): the costs are the architecture's, the errors a random network's only"
    setting = {
        "what": "seconds of one teacher's targets per student image, and error against native",
        "teacher": arguments.teacher,
        "weights": arguments.pretrained or random,
        "canvas_px": teacher.native_size,
        "stride": teacher.stride,
        "threads": THREADS,
        "rounds": arguments.rounds,
        "pictures": str(arguments.images or "the demo's photographs"),
    }
    write(f"mosaic_{arguments.teacher}", setting | figures)
    over = [size for size, row in figures["sizes"].items() if not row["mosaic_within_bound"]]
    if over:
        raise SystemExit(f"at {', '.join(over)} px a mosaic costs over {LEEWAY} / k^2 of native")


if __name__ == "__main__":
    main()
