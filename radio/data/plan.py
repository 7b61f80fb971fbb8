"""What every step sees, as one pure function of its number.

`Plan(step)` names the samples, their crops' keys, the partitions and the teachers' view modes of
a step. Nothing else owns order: a stream, a teacher or a resumed run asks again and gets the same.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from radio.errors import RadioError

ROUNDS = (
    4  # a 4-round Feistel network over a keyed hash is a pseudo-random permutation (Luby-Rackoff)
)


def seed_for(seed: int, purpose: str, *key: int) -> int:
    """Return a 63-bit seed for one purpose and key; the only source of seeds in the project."""
    text = "/".join([str(seed), purpose, *map(str, key)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def permute(position: int, size: int, seed: int) -> int:
    """Return where `position` in [0, size) goes in a seeded permutation, in O(1) memory.

    A Feistel network over the next even number of bits, walked until the value falls inside
    [0, size) again, so that no table of `size` entries is ever made.
    """
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    value = position
    while True:
        left, right = value >> half, value & mask
        for round_ in range(ROUNDS):
            left, right = right, left ^ (seed_for(seed, "feistel", round_, right) & mask)
        value = (left << half) | right
        if value < size:
            return value


@dataclass(frozen=True)
class ViewSpec:
    """One view: which sample, and the (epoch, position) that key its crop and its redraws."""

    sample: int
    epoch: int
    position: int


@dataclass(frozen=True)
class PartitionSpec:
    """A share of a step: one student resolution in pixels, its views, each teacher's view mode.

    `order` is the order in which the views lie on canvases, drawn anew every step, so that each
    place of a canvas sees every kind of picture. `shape` is (height, width) of views that are not
    square. A crop is `margin` patches larger than what each reader sees of it. `shards` are the
    numbers of the micro-shards that the views lie in, all of one size, one after the other; `order`
    counts within each.
    """

    name: str
    image_size: int
    views: tuple[ViewSpec, ...]
    modes: dict[str, str]
    order: tuple[int, ...]
    merge_per_block: int = 0
    window: int | None = None
    shape: tuple[int, int] | None = None
    margin: int = 0
    shards: tuple[int, ...] = (0,)

    @property
    def pixels(self) -> tuple[int, int]:
        """(height, width) of the student's views."""
        return self.shape or (self.image_size, self.image_size)


@dataclass(frozen=True)
class StepSpec:
    """Everything that decides what a step computes on."""

    step: int
    stage: int
    stage_step: int
    partitions: tuple[PartitionSpec, ...]


@dataclass(frozen=True)
class PartitionPlan:
    """A partition as the configuration states it: pixels, views per step, view modes.

    Every step draws one of `image_sizes` (empty: it is `image_size`) and one width over height of
    `aspects` (empty: views are square).
    """

    name: str
    image_size: int
    batch: int
    modes: dict[str, str]
    merge_per_block: int = 0
    image_sizes: tuple[int, ...] = ()
    window: int | None = None
    aspects: tuple[float, ...] = ()
    patch_size: int = 16
    margin: int = 0
    micro_shard: int | None = None
    windows: tuple[int, ...] = ()

    @property
    def num_shards(self) -> int:
        """Micro-shards of a step."""
        return 1 if self.micro_shard is None else self.batch // self.micro_shard


@dataclass(frozen=True)
class StagePlan:
    """A number of steps over the same partitions.

    Recipe: several resolutions in one step; RADIOv2.5 (2412.07679); stages[].partitions,
    stages[].partitions.*.image_size;
    tests/test_plan.py::test_an_epoch_sees_every_sample_once_and_leaves_its_tail.
    """

    steps: int
    partitions: tuple[PartitionPlan, ...]

    @property
    def views_per_step(self) -> int:
        """Views that one step of this stage draws, over all partitions."""
        return sum(partition.batch for partition in self.partitions)


class Plan:
    """Map a step number to its StepSpec.

    An epoch of a stage is `num_samples // views_per_step` whole steps; the tail is left out, so
    that with `repeat_epochs` a view meets the same partition and canvas again. `repeat_epochs`
    0 means that views never repeat.
    """

    def __init__(
        self, seed: int, num_samples: int, stages: Sequence[StagePlan], repeat_epochs: int = 0
    ) -> None:
        self.seed = seed
        self.num_samples = num_samples
        self.stages = tuple(stages)
        self.repeat_epochs = repeat_epochs
        for number, stage in enumerate(self.stages):
            if stage.views_per_step > num_samples:
                raise RadioError(
                    f"stages[{number}] draws {stage.views_per_step} views per step but data.train "
                    f"has only {num_samples} pictures; lower the partitions' batch or add pictures"
                )

    def steps_of(self, stage: int) -> range:
        """Return the global numbers of a stage's steps."""
        first = sum(earlier.steps for earlier in self.stages[:stage])
        return range(first, first + self.stages[stage].steps)

    @property
    def num_steps(self) -> int:
        """Steps of all stages together."""
        return sum(stage.steps for stage in self.stages)

    def locate(self, step: int) -> tuple[int, int]:
        """Return (stage, step within the stage) of a global step."""
        rest = step
        for number, stage in enumerate(self.stages):
            if rest < stage.steps:
                return number, rest
            rest -= stage.steps
        raise IndexError(f"step {step} is beyond the plan's {self.num_steps} steps")

    def views_of(self, step: int) -> int:
        """Return the number of views of a step, over all partitions and processes."""
        return self.stages[self.locate(step)[0]].views_per_step

    def epoch(self, step: int) -> int:
        """Return the epoch within its stage that a step belongs to."""
        number, stage_step = self.locate(step)
        return stage_step // (self.num_samples // self.stages[number].views_per_step)

    def __call__(self, step: int) -> StepSpec:
        """Return the StepSpec of a global step number."""
        number, stage_step = self.locate(step)
        stage = self.stages[number]
        steps_per_epoch = self.num_samples // stage.views_per_step
        epoch, step_of_epoch = divmod(stage_step, steps_per_epoch)
        if self.repeat_epochs:
            epoch %= self.repeat_epochs
        order = seed_for(self.seed, "order", epoch)
        position = step_of_epoch * stage.views_per_step
        partitions = []
        for partition in stage.partitions:
            positions = range(position, position + partition.batch)
            views = tuple(
                ViewSpec(permute(at, self.num_samples, order), epoch, at) for at in positions
            )
            key = epoch, step_of_epoch
            size = self._size(partition, key)
            spec = _with_views(partition, views, size, self._order(partition, key))
            shape = self._shape(partition, size, key)
            partitions.append(
                replace(
                    spec,
                    shape=shape,
                    window=self._window(partition, shape or (size, size), key),
                    margin=partition.margin,
                    shards=tuple(range(partition.num_shards)),
                )
            )
            position += partition.batch
        return StepSpec(step, number, stage_step, tuple(partitions))

    def _order(self, partition: PartitionPlan, key: tuple[int, int]) -> tuple[int, ...]:
        """Return a step's order on canvases, which never holds views of two micro-shards."""
        size = partition.batch // partition.num_shards
        order: list[int] = []
        for shard in range(partition.num_shards):
            numbered = (*key, shard) if shard else key
            tiles = seed_for(self.seed, f"tiles/{partition.name}", *numbered)
            order += (permute(at, size, tiles) for at in range(size))
        return tuple(order)

    def _size(self, partition: PartitionPlan, key: tuple[int, int]) -> int:
        """Return a step's resolution; with `repeat_epochs` it comes back with its views.

        Recipe: resolutions drawn by the step; C-RADIOv4 (2601.17237);
        stages[].partitions.*.image_sizes;
        tests/test_stages.py::test_every_step_draws_a_resolution_and_the_same_one_each_time.
        """
        if not partition.image_sizes:
            return partition.image_size
        drawn = seed_for(self.seed, f"size/{partition.name}", *key)
        return partition.image_sizes[drawn % len(partition.image_sizes)]

    def _shape(
        self, partition: PartitionPlan, size: int, key: tuple[int, int]
    ) -> tuple[int, int] | None:
        """Return a step's (height, width), or None for the square.

        Recipe: shapes drawn by the step; ours; stages[].partitions.*.aspects;
        tests/test_shifts.py::test_aspects_are_drawn_by_the_step.
        """
        if not partition.aspects:
            return None
        drawn = seed_for(self.seed, f"aspect/{partition.name}", *key)
        return shape_of(
            size, partition.aspects[drawn % len(partition.aspects)], partition.patch_size
        )

    def _window(
        self, partition: PartitionPlan, shape: tuple[int, int], key: tuple[int, int]
    ) -> int | None:
        """Return a step's window, drawn among those that tile its grid.

        Recipe: windows drawn by the step; AM-RADIO (2312.06709); stages[].partitions.*.windows;
        tests/test_shifts.py::test_windows_are_drawn_among_those_that_tile_the_grid.
        """
        fitting = windows_for(partition.windows, shape, partition.patch_size)
        if not fitting:
            return partition.window
        drawn = seed_for(self.seed, f"window/{partition.name}", *key)
        return fitting[drawn % len(fitting)] or None

    def held_out(
        self, num_samples: int, batch: int, teachers: Collection[str]
    ) -> list[PartitionSpec]:
        """Return the last stage's partitions over a held-out set, `batch` views at a time.

        Each resolution occurs once (its first partition speaks for it), with those of its
        teachers that are named; views are square and whole, crops are keyed by the sample's own
        number, so the same set is seen after any number of steps.
        """
        specs = []
        seen: Mapping[int, PartitionPlan] = {}
        for partition in self.stages[-1].partitions:
            if partition.image_size in seen:
                continue
            modes = {name: mode for name, mode in partition.modes.items() if name in teachers}
            if not modes:
                continue
            partition = replace(partition, modes=modes)
            seen = {**seen, partition.image_size: partition}
            for start in range(0, num_samples, batch):
                samples = range(start, min(start + batch, num_samples))
                views = tuple(ViewSpec(sample, 0, sample) for sample in samples)
                order = tuple(range(len(views)))
                specs.append(_with_views(partition, views, partition.image_size, order))
        return specs


def windows_for(windows: Sequence[int], shape: tuple[int, int], patch_size: int) -> list[int]:
    """Return the windows that tile the grid of a (height, width); 0, no window, always does."""
    sides = [side // patch_size for side in shape]
    return [window for window in windows if not window or not any(side % window for side in sides)]


def shape_of(size: int, aspect: float, patch_size: int) -> tuple[int, int]:
    """Return (height, width) in whole patches, about size^2 in area and `aspect` wide over high."""
    rows = max(1, round(size / math.sqrt(aspect) / patch_size))
    columns = max(1, round(size * math.sqrt(aspect) / patch_size))
    return rows * patch_size, columns * patch_size


def _with_views(
    partition: PartitionPlan, views: tuple[ViewSpec, ...], image_size: int, order: tuple[int, ...]
) -> PartitionSpec:
    return PartitionSpec(
        partition.name,
        image_size,
        views,
        partition.modes,
        order,
        partition.merge_per_block,
        partition.window,
    )
