"""What runs in Ray's processes: a replica of a teacher, and a feeder that decodes pictures."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch

from radio.config import Config
from radio.data.plan import PartitionSpec
from radio.data.views import ViewReader, Views
from radio.errors import RadioError
from radio.targets.stream import device_of
from radio.targets.target_maker import (
    CodedTarget,
    Reading,
    Request,
    TargetMaker,
    TeacherFacts,
    build_readers,
    build_target_maker,
)


@dataclass(frozen=True)
class FedViews:
    """Views as they travel: numpy crosses Ray's store without a copy, tensors do not."""

    pixels: np.ndarray
    keys: tuple[str, ...]
    replaced: tuple[tuple[str, str], ...]
    offsets: tuple[tuple[int, int], ...] | None

    @classmethod
    def of(cls, views: Views) -> FedViews:
        """Pack views."""
        return cls(views.pixels.numpy(), views.keys, views.replaced, views.offsets)

    def views(self) -> Views:
        """Unpack them; arrays out of the store are read-only, so the pixels are copied."""
        return Views(torch.tensor(self.pixels), self.keys, self.replaced, self.offsets)


class Worker:
    """A process of a run that says who it is.

    `home` is the folder that the run was started in, which relative paths count from; on nodes that
    do not see it such paths are not found, and said so. The pictures' index comes with every call,
    by a reference inside a list, and is fetched once: an argument of the constructor could not be
    had again when a lost process is started anew.
    """

    def __init__(self, config: Config, home: str) -> None:
        self.config = config
        self._readers: dict[str, ViewReader] = {}
        if Path(home).is_dir():
            os.chdir(home)

    def readers(self, sources: list[Any]) -> dict[str, ViewReader]:
        """Return a reader per split, made once."""
        if not self._readers:
            self._readers = build_readers(self.config, ray.get(sources[0]))
        return self._readers

    def pid(self) -> int:
        """Return the process id."""
        return os.getpid()

    def node(self) -> str:
        """Return the id of the node that it lives on."""
        return str(ray.get_runtime_context().get_node_id())


class TeacherActor(Worker):
    """One replica of one teacher.

    The network is built at the first call, not in the constructor: a mistake in the
    configuration then reaches the user as itself, and a restarted replica rebuilds alone.
    """

    def __init__(self, config: Config, name: str, home: str) -> None:
        super().__init__(config, home)
        self.name = name
        self.incarnation = 0
        self._maker: TargetMaker | None = None

    def maker(self, sources: list[Any]) -> TargetMaker:
        """Return the teacher, built when it is needed."""
        if self._maker is None:
            torch.set_num_threads(self.config.threads.teacher)
            device, readers = device_of(self.config), self.readers(sources)
            self._maker = build_target_maker(self.config, self.name, readers, device)
        return self._maker

    def ready(self, sources: list[Any]) -> TeacherFacts:
        """Build the teacher and return its facts."""
        return self.maker(sources).facts

    def awake(self) -> bool:
        """Return whether the network is in memory."""
        return self._maker is not None

    def sleep(self) -> None:
        """Let the network's memory go until the next call, which builds it again."""
        self._maker = None
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def encode(
        self,
        sources: list[Any],
        partitions: tuple[PartitionSpec, ...],
        request: Request,
        incarnation: int,
        *fed: FedViews | None,
    ) -> dict[int, CodedTarget]:
        """Return this teacher's coded targets of a step, by the partition's number.

        `fed` are the views of each partition, read here where there are none. A call of an older
        incarnation of the student is refused: its student is dead.
        """
        if incarnation < self.incarnation:
            raise RadioError(
                f"teacher '{self.name}' serves incarnation {self.incarnation} of the student; "
                f"a call of incarnation {incarnation} came late"
            )
        self.incarnation = incarnation
        given, maker = fed or (None,) * len(partitions), self.maker(sources)
        return {
            number: maker(partition, request, None if views is None else views.views())
            for number, (partition, views) in enumerate(zip(partitions, given, strict=True))
            if self.name in partition.modes
        }


class Feeder(Worker):
    """Reads a partition's views at every size that somebody wants, decoding a picture once."""

    def ready(self, sources: list[Any]) -> None:
        """Answer once the pictures can be read."""
        torch.set_num_threads(1)
        self.readers(sources)

    def feed(
        self,
        sources: list[Any],
        partition: PartitionSpec,
        split: str,
        readings: tuple[Reading, ...],
    ) -> list[FedViews] | FedViews:
        """Return the views in each of the ways that they are wanted; itself where it is one."""
        reader = self.readers(sources)[split]
        fed = [FedViews.of(reading.read(reader, partition)) for reading in readings]
        return fed[0] if len(fed) == 1 else fed
