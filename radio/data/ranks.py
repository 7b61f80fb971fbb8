"""Which part of a step each of the student's processes takes; micro-shards are taken whole."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from radio.data.plan import PartitionSpec, Plan, StagePlan, StepSpec
from radio.errors import RadioError


@dataclass(frozen=True)
class Ranks:
    """This process among `size`; with placement by_rank it has views of one partition only.

    Where papers place partitions on different GPUs, the gradients are those of all together.

    Recipe: partitions on different ranks; AM-RADIO (2312.06709); parallel.placement;
    tests/test_parallel.py::test_four_ranks_have_the_gradients_of_one_process.
    """

    rank: int = 0
    size: int = 1
    placement: str = "together"

    @property
    def leads(self) -> bool:
        """Whether this is the process that writes and measures."""
        return self.rank == 0

    def share(self, spec: StepSpec, stage: StagePlan) -> StepSpec:
        """Return this process's part of a step; a partition without a part in it is left out."""
        if self.size == 1:
            return spec
        groups = self._groups(stage)
        parts = []
        for partition, ranks in zip(spec.partitions, groups, strict=True):
            if self.rank not in ranks:
                continue
            places = range(ranks.index(self.rank), len(partition.shards), len(ranks))
            if places:
                parts.append(taken(partition, places))
        return replace(spec, partitions=tuple(parts))

    def _groups(self, stage: StagePlan) -> list[range]:
        """Return the ranks of every partition, as many as its share of the student's pixels."""
        if self.placement == "together":
            return [range(self.size)] * len(stage.partitions)
        pixels = [part.batch * part.image_size**2 for part in stage.partitions]
        spare = self.size - len(pixels)  # everyone gets one
        wanted = [spare * each / sum(pixels) for each in pixels]
        counts = [1 + int(each) for each in wanted]
        rest = sorted(range(len(pixels)), key=lambda at: int(wanted[at]) - wanted[at])
        for at in rest[: self.size - sum(counts)]:
            counts[at] += 1
        ends = [sum(counts[: at + 1]) for at in range(len(counts))]
        return [range(end - count, end) for end, count in zip(ends, counts, strict=True)]

    def check(self, plan: Plan) -> None:
        """Refuse a number of processes of which some would have nothing to do.

        Raises:
            RadioError: names the stage, what it has and the keys to change.
        """
        for number, stage in enumerate(plan.stages):
            if self.placement == "by_rank" and self.size < len(stage.partitions):
                raise RadioError(
                    f"parallel.placement=by_rank needs a process for each of the "
                    f"{len(stage.partitions)} partitions of stages[{number}], but there are "
                    f"{self.size}; start more, or set parallel.placement=together"
                )
            first = plan(plan.steps_of(number).start)
            ranks = [replace(self, rank=rank) for rank in range(self.size)]
            idle = [each.rank for each in ranks if not each.share(first, stage).partitions]
            if idle:
                shards = sum(len(partition.shards) for partition in first.partitions)
                raise RadioError(
                    f"stages[{number}] has {shards} micro-shards for {self.size} processes, so "
                    f"process {idle[0]} has none; lower parallel.micro_shard, or start fewer "
                    "processes"
                )


def micro_shards(partition: PartitionSpec) -> list[PartitionSpec]:
    """Return a partition's micro-shards one by one."""
    return [taken(partition, [place]) for place in range(len(partition.shards))]


def taken(partition: PartitionSpec, places: Sequence[int]) -> PartitionSpec:
    """Return the partition with only the micro-shards at these places."""
    size = len(partition.views) // len(partition.shards)
    rows = [row for place in places for row in range(place * size, (place + 1) * size)]
    return replace(
        partition,
        views=tuple(partition.views[row] for row in rows),
        order=tuple(partition.order[row] for row in rows),
        shards=tuple(partition.shards[place] for place in places),
    )
