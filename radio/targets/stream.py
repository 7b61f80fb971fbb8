"""The stream: an iterator of StepBatch, the same whether teachers are here or far away.

    for batch in stream.read(steps, request):      # StepBatch(step, partitions)
        losses = step(student, batch)

A Stream is told which steps to read and delivers them in order, each exactly once.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from radio.config import Config
from radio.data.configured import training_plan
from radio.data.plan import PartitionSpec, StepSpec
from radio.data.shards import ImageSource, open_images
from radio.data.views import ViewReader, Views
from radio.errors import RadioError
from radio.targets import codec
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
class Target:
    """What one teacher says of a partition's views, features standardized.

    `shift` is (down, right) of the teacher's crops from the student's in patches, None where both
    see the same.
    """

    summary: Float[Tensor, "b c"] | None
    features: Float[Tensor, "b d h w"]
    valid: Bool[Tensor, "b h w"]
    shift: Int[Tensor, "b 2"] | None = None


@dataclass(frozen=True)
class PartitionBatch:
    """A partition's pictures for the student and the targets it is matched to.

    With a shift margin, `twin_images` are the student's pictures on crops of their own, which lie
    `twin_shift` (down, right) patches from the first: what its average sees. `shards` are the
    micro-shards' numbers, as in PartitionSpec.
    """

    name: str
    images: UInt8[Tensor, "b 3 h w"]
    targets: dict[str, Target]
    merge_per_block: int = 0
    window: int | None = None
    twin_images: UInt8[Tensor, "b 3 h w"] | None = None
    twin_shift: Int[Tensor, "b 2"] | None = None
    shards: tuple[int, ...] = (0,)


@dataclass(frozen=True)
class StepBatch:
    """Everything one step computes on.

    `damaged` maps the key of every picture that was replaced to the reason; `wait_seconds` is
    the time the student stood still for this batch, `waits` what of it was for each teacher;
    `busy_seconds` each teacher's own work, `num_bytes` of each one's targets as they travelled.
    """

    step: int
    partitions: tuple[PartitionBatch, ...]
    damaged: Mapping[str, str] = field(default_factory=dict)
    wait_seconds: float = 0.0
    busy_seconds: Mapping[str, float] = field(default_factory=dict)
    waits: Mapping[str, float] = field(default_factory=dict)
    num_bytes: Mapping[str, int] = field(default_factory=dict)

    @property
    def num_images(self) -> int:
        """Student pictures in the step."""
        return sum(len(partition.images) for partition in self.partitions)


Coded = list[dict[str, CodedTarget]]  # a step's targets by partition, then by teacher


@runtime_checkable
class Stream(Protocol):
    """Where targets come from: LocalStream, CachedStream, ray_jobs.feature_stream.RayStream."""

    @property
    def teachers(self) -> Mapping[str, TeacherFacts]:
        """Each teacher's dims and fingerprint."""

    @property
    def sources(self) -> Mapping[str, ImageSource]:
        """The pictures of each split ("train", "val")."""

    def encode(
        self, specs: Iterable[StepSpec], request: Request, incarnation: int = 0
    ) -> Iterator[tuple[StepSpec, Coded]]:
        """Yield each spec in order with the targets that its partitions' modes ask for."""

    def read(
        self, specs: Iterable[StepSpec], request: Request, incarnation: int = 0
    ) -> Iterator[StepBatch]:
        """Yield the specs' batches in order, each exactly once."""

    def close(self) -> None:
        """Let the teachers go."""


def open_sources(config: Config) -> dict[str, ImageSource]:
    """Open the pictures of a run, `data.train` and any `data.val`, before anything is started.

    Raises:
        RadioError: no pictures there, fewer than a step needs, or views that no canvas can hold.
    """
    sources = {"train": _open("data.train", config.data.train)}
    if config.data.val is not None:
        sources["val"] = _open("data.val", config.data.val)
    training_plan(config, len(sources["train"]))  # says now what would fail later
    return sources


def _open(key: str, location: str) -> ImageSource:
    try:
        return open_images(location)
    except RadioError as error:
        raise RadioError(f"{key}: {error}") from error


def device_of(config: Config) -> torch.device:
    """Return the run's device; `auto` takes CUDA where there is one."""
    if config.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.device(config.device)
    except RuntimeError as error:
        raise RadioError(f"device is '{config.device}'; use auto, cpu or cuda") from error


class LocalStream:
    """Teachers in this process, one after the other: the reference that every stream equals.

    Teachers whose `facts` are known already are built when a step first needs them.
    """

    def __init__(self, config: Config, facts: Mapping[str, TeacherFacts] | None = None) -> None:
        self.config = config
        self._sources = open_sources(config)
        self._readers = build_readers(config, self._sources)
        torch.set_num_threads(config.threads.student)
        self.makers: dict[str, TargetMaker] = {}
        self._facts = dict(facts or {})
        self._facts = self._facts or {name: self._maker(name).facts for name in config.teachers}

    def _maker(self, name: str) -> TargetMaker:
        """Return a teacher, built when it is first needed."""
        if name not in self.makers:
            device = device_of(self.config)
            maker = build_target_maker(self.config, name, self._readers, device)
            if name in self._facts and self._facts[name] != maker.facts:
                raise RadioError(
                    f"teacher '{name}' has other weights here than in the leading process; give "
                    "every process the same files"
                )
            self.makers[name] = maker
        return self.makers[name]

    @property
    def teachers(self) -> Mapping[str, TeacherFacts]:
        """Each teacher's dims and fingerprint."""
        return self._facts

    @property
    def sources(self) -> Mapping[str, ImageSource]:
        """The pictures of each split."""
        return self._sources

    def encode(
        self, specs: Iterable[StepSpec], request: Request, incarnation: int = 0
    ) -> Iterator[tuple[StepSpec, Coded]]:
        """Yield each spec with its targets; `incarnation` fences nothing in one process."""
        for spec in specs:
            yield spec, self._encode(spec, request)

    def read(
        self, specs: Iterable[StepSpec], request: Request, incarnation: int = 0
    ) -> Iterator[StepBatch]:
        """Yield the specs' batches in order."""
        coded = self.encode(specs, request, incarnation)
        return batches(coded, read_by(self._readers[request.split]), request, self.config)

    def _encode(self, spec: StepSpec, request: Request) -> Coded:
        """Run every teacher on its own number of threads, then give the student its back."""
        torch.set_num_threads(self.config.threads.teacher)
        try:
            return [
                {name: self._maker(name)(partition, request) for name in partition.modes}
                for partition in spec.partitions
            ]
        finally:
            torch.set_num_threads(self.config.threads.student)

    def close(self) -> None:
        """Let the teachers' memory go."""
        self.makers.clear()

    def __enter__(self) -> LocalStream:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


@dataclass(frozen=True)
class StudentViews:
    """What the student sees of a partition, and its average, where that sees crops of its own."""

    own: Views
    twin: Views | None = None


ReadViews = Callable[[StepSpec, int, Reading], Views]  # of a step's partition by its number


def read_by(reader: ViewReader) -> ReadViews:
    """Return what reads views in this process."""
    return lambda spec, number, reading: reading.read(reader, spec.partitions[number])


def student_readings(partition: PartitionSpec, config: Config) -> list[Reading]:
    """Return how the student sees a partition, and its average, where that sees other crops."""
    names = ["student"]
    if partition.margin and config.losses.mesa_weight:
        names.append("average")
    patch = config.student.patch_size
    return [Reading.of(partition, patch, name, partition.pixels) for name in names]


def student_views(spec: StepSpec, read: ReadViews, config: Config) -> list[StudentViews]:
    """Read the student's own views of every partition of a step."""
    return [
        StudentViews(*(read(spec, at, each) for each in student_readings(partition, config)))
        for at, partition in enumerate(spec.partitions)
    ]


def batches(
    coded: Iterator[tuple[StepSpec, Coded]], read: ReadViews, request: Request, config: Config
) -> Iterator[StepBatch]:
    """Yield a batch for each step that is encoded, with the student's own views."""
    while True:
        started = time.perf_counter()
        step = next(coded, None)
        if step is None:
            return
        waited = time.perf_counter() - started
        spec, targets = step
        yield assemble(spec, student_views(spec, read, config), targets, request, waited)


def assemble(
    spec: StepSpec,
    student: list[StudentViews],
    coded: Coded,
    request: Request,
    wait_seconds: float,
) -> StepBatch:
    """Put a step together from the student's own views and the teachers' coded targets.

    Raises:
        RadioError: a teacher used other pictures than the student (joins are by key, never by
            position alone).
    """
    partitions, damaged = [], dict[str, str]()
    busy, waits = defaultdict[str, float](float), defaultdict[str, float](float)
    num_bytes = defaultdict[str, int](int)
    for partition, views, targets in zip(spec.partitions, student, coded, strict=True):
        own, twin = views.own, views.twin
        damaged.update(own.replaced)
        for name, target in targets.items():
            _same_keys(name, partition, own, target)
            busy[name] += target.seconds
            waits[name] += target.waited
            num_bytes[name] += target.num_bytes
        partitions.append(
            PartitionBatch(
                partition.name,
                own.pixels,
                {name: _decode(target, request, own) for name, target in targets.items()},
                partition.merge_per_block,
                partition.window,
                None if twin is None else twin.pixels,
                None if twin is None else _shift(own, twin),
                partition.shards,
            )
        )
    return StepBatch(
        spec.step,
        tuple(partitions),
        damaged,
        wait_seconds,
        dict(busy),
        dict(waits),
        dict(num_bytes),
    )


def _decode(target: CodedTarget, request: Request, own: Views) -> Target:
    summary = None
    if target.summary is not None:
        summary = codec.decode(target.summary, request.summary_codec)
    features = codec.decode(target.features, request.codec)
    return Target(summary, features, torch.tensor(target.valid), _shift(own, target))


def _shift(own: Views, other: Views | CodedTarget) -> Tensor | None:
    """Return (down, right) in patches of another reader's crops from the student's own."""
    if own.offsets is None or other.offsets is None:
        return None
    return torch.tensor(other.offsets) - torch.tensor(own.offsets)


def _same_keys(name: str, partition: PartitionSpec, views: Views, target: CodedTarget) -> None:
    if target.keys == views.keys:
        return
    pairs = zip(views.keys, target.keys, strict=True)
    ours, theirs = next((a, b) for a, b in pairs if a != b)
    raise RadioError(
        f"teacher '{name}' answered for picture '{theirs}' where the student has '{ours}' "
        f"(partition '{partition.name}'): both must read the same data; check that every node "
        "sees the same files"
    )
