"""RayStream: the same batches as LocalStream, with the teachers in actors of their own.

Every call is a pure function of the step's spec, so a lost one is asked again, anywhere. The
stream lives inside the student's process, keeps a window of steps in flight and hands steps out
in order, each exactly once. A thread looks after the pools while the student computes.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Any

import ray
import torch
import torch.distributed as dist

from radio.config import Config, teachers_of
from radio.data.plan import PartitionSpec, StepSpec
from radio.data.shards import ImageSource
from radio.data.views import Views
from radio.errors import RadioError
from radio.targets.stream import Coded, StepBatch, batches, open_sources, student_readings
from radio.targets.target_maker import (
    CodedTarget,
    Reading,
    Request,
    TeacherFacts,
    build_readers,
    reading_of,
)
from ray_jobs.gauges import Gauges
from ray_jobs.pool import LOOK_SECONDS, Ask, Send, rest
from ray_jobs.replica import LOST
from ray_jobs.window import Window, most_steps, room_in_store
from ray_jobs.workers import Workers

WATCH_SECONDS = 0.05  # until the watch sees calls that the student's thread has made
JOIN_SECONDS = 10.0  # for the watch to end
STUDENT_SECONDS = 5.0  # that the student waits for fed views before it reads them itself


@dataclass
class Asked:
    """A step in flight: what was asked, each teacher's work, and views by (partition, reading)."""

    spec: StepSpec
    work: dict[str, Ask] = field(default_factory=dict)
    fed: dict[tuple[int, Reading], Any] = field(default_factory=dict)


class RayStream:
    """Targets from a pool of actors per teacher; needs a connected Ray (`ray_jobs.cluster`).

    Args:
        config: the run.
        sources: its pictures, where the caller has opened them already.
        workers: teachers and feeders, where the caller has started them, and ends them.
    """

    def __init__(
        self,
        config: Config,
        sources: Mapping[str, ImageSource] | None = None,
        workers: Workers | None = None,
    ) -> None:
        self.config = config
        self._sources = open_sources(config) if sources is None else sources
        self._readers = build_readers(config, self._sources)
        torch.set_num_threads(config.threads.student)
        self._workers = workers or Workers.start(config, self._sources)
        self._owned = workers is None
        rank, ranks = ranks_here()
        self.feeders, self.pools = self._workers.connect(config, rank, ranks)
        replicas = max(len(pool.replicas) for pool in self.pools.values())
        most = most_steps(config.cluster.window, replicas, ranks)
        self._window = Window(most, room_in_store() / ranks)
        self._ahead: list[deque[Asked]] = []  # steps in flight of each who reads this stream
        self._awake = set(self.pools)
        self._views: dict[tuple[int, Reading], Any] = {}  # of the step that is handed out
        self.gauges = Gauges(self.pools)
        self.fed = 0  # times that the student took views from a feeder
        self._lock = threading.Lock()  # of the pools and what is in flight
        self._closed = threading.Event()
        self._failed: Exception | None = None
        self._watch = threading.Thread(target=self._keep_watch, name="watch", daemon=True)
        self._watch.start()

    @property
    def teachers(self) -> Mapping[str, TeacherFacts]:
        """Each teacher's dims and fingerprint."""
        return self._workers.facts

    @property
    def sources(self) -> Mapping[str, ImageSource]:
        """The pictures of each split."""
        return self._sources

    @property
    def retries(self) -> int:
        """How often work was asked for again because it was lost."""
        return sum(pool.retries for pool in self.pools.values())

    def read(
        self, specs: Iterable[StepSpec], request: Request, incarnation: int = 0
    ) -> Iterator[StepBatch]:
        """Yield the specs' batches in order."""
        coded = self.encode(specs, request, incarnation)

        def read(spec: StepSpec, number: int, reading: Reading) -> Views:
            return self._fed(number, reading) or reading.read(
                self._readers[request.split], spec.partitions[number]
            )

        return batches(coded, read, request, self.config)

    def encode(
        self, specs: Iterable[StepSpec], request: Request, incarnation: int = 0
    ) -> Iterator[tuple[StepSpec, Coded]]:
        """Yield each spec in order with its targets, a window of steps in flight.

        Raises:
            RadioError: a teacher's mistake, nobody answers, or a step that the store cannot hold.
        """
        waiting = iter(specs)
        in_flight: deque[Asked] = deque()
        self._ahead.append(in_flight)
        try:
            self._fill(in_flight, waiting, request, incarnation)
            while in_flight:
                asked, answers = in_flight[0], self._answers(in_flight)
                self._window.saw(answers, asked.spec.step)
                with self._lock:
                    in_flight.popleft()
                self._fill(in_flight, waiting, request, incarnation)  # before the student works
                coded = [
                    {name: answers[name][number] for name in partition.modes}
                    for number, partition in enumerate(asked.spec.partitions)
                ]
                self._views = asked.fed
                yield asked.spec, coded
        finally:
            self._ahead = [each for each in self._ahead if each is not in_flight]

    def _fill(
        self,
        in_flight: deque[Asked],
        waiting: Iterator[StepSpec],
        request: Request,
        incarnation: int,
    ) -> None:
        others = sum(map(len, self._ahead)) - len(in_flight)
        training = request.split == "train" and bool(request.standardizers)  # no fit
        while len(in_flight) < self._window.steps(others):
            if (spec := next(waiting, None)) is None:
                return
            with self._lock:
                if training:
                    self._let_sleep(spec)
                in_flight.append(self._ask(spec, request, incarnation))

    def _ask(self, spec: StepSpec, request: Request, incarnation: int) -> Asked:
        """Send a step's pictures to a feeder, where there is one, and its work to the teachers."""
        asked = Asked(spec, fed=self._feed(spec, request))
        names = {name for partition in spec.partitions for name in partition.modes}
        for name, pool in self.pools.items():
            if name not in names:
                continue
            fed = [
                asked.fed.get((number, reading_of(self.config, name, partition)))
                if name in partition.modes
                else None
                for number, partition in enumerate(spec.partitions)
            ]
            asked.work[name] = pool.ask(
                _encoding(self._workers.sources, spec, request, incarnation, fed),
                f"step {spec.step}",
            )
        self._awake |= names
        return asked

    def _feed(self, spec: StepSpec, request: Request) -> dict[tuple[int, Reading], Any]:
        """Return references to a step's views in every way that somebody wants them."""
        if self.feeders is None:
            return {}
        fed: dict[tuple[int, Reading], Any] = {}
        for number, partition in enumerate(spec.partitions):
            if not partition.modes:  # a cache has all of it, and reads the student's views itself
                continue
            wanted = dict.fromkeys(student_readings(partition, self.config))
            wanted |= dict.fromkeys(
                reading_of(self.config, name, partition) for name in partition.modes
            )
            readings = tuple(wanted)
            sending = _feeding(self._workers.sources, partition, request.split, readings)
            refs = self.feeders.send(sending)
            fed |= {(number, reading): ref for reading, ref in zip(readings, refs, strict=True)}
        return fed

    def _fed(self, number: int, reading: Reading) -> Views | None:
        """Return fed views for the student; None where there are none, or they were lost."""
        ref = self._views.get((number, reading))
        if ref is None:
            return None
        try:
            views: Views = ray.get(ref, timeout=STUDENT_SECONDS).views()
        except (*LOST, ray.exceptions.GetTimeoutError, ray.exceptions.RayTaskError):
            return None  # what is wrong with the pictures is said by reading them here
        self.fed += 1
        return views

    def _answers(self, in_flight: Sequence[Asked]) -> dict[str, dict[int, CodedTarget]]:
        """Wait for the first step's teachers."""
        work, waited, clock = in_flight[0].work, dict[str, float](), time.perf_counter()
        while len(waited) < len(work):
            with self._lock:
                if self._failed is not None:
                    raise self._failed
                self._look(work)
            for name, ask in work.items():
                if ask.answered and name not in waited:  # since the one before it
                    now = time.perf_counter()
                    waited[name], clock = now - clock, now
            rest([(self.pools[name], ask) for name, ask in work.items() if not ask.answered])
        with self._lock:
            return {name: self._told(name, work[name].value, waited[name]) for name in work}

    def _look(self, wanted: Mapping[str, Ask] | None = None) -> None:
        """See who died, hangs or is back, and ask again for what is lost of any step in flight.

        The student waits for what is `wanted`.
        """
        for name, pool in self.pools.items():
            pool.watch()
            for in_flight in self._ahead:
                for asked in in_flight:
                    if name in asked.work:
                        pool.poll(asked.work[name], asked.work is wanted)

    def _keep_watch(self) -> None:
        """Look while the student computes; what goes wrong is raised where it asks next."""
        looked = time.monotonic()
        while not self._closed.is_set():
            try:
                if not self._something_done() and time.monotonic() - looked < LOOK_SECONDS:
                    continue
                looked = time.monotonic()
                with self._lock:
                    self._look()
            except (RadioError, ray.exceptions.RayError) as error:
                self._failed = error
                return

    def _something_done(self) -> bool:
        """Return whether a call of a step in flight is done, waiting a moment for one."""
        with self._lock:
            work = [ask for each in self._ahead for asked in each for ask in asked.work.values()]
            calls = [call for ask in work for call in ask.calls]
        if calls:
            return bool(ray.wait(calls, timeout=WATCH_SECONDS)[0])
        self._closed.wait(WATCH_SECONDS)
        return False

    def _told(
        self, name: str, targets: dict[int, CodedTarget], waited: float
    ) -> dict[int, CodedTarget]:
        """Return a teacher's targets of a step, the first with what the student waited for them."""
        self.pools[name].took(sum(target.seconds for target in targets.values()))
        self.gauges.note(name, self.pools[name], list(targets.values()), waited)
        first = min(targets)
        return targets | {first: replace(targets[first], waited=waited)}

    def _let_sleep(self, spec: StepSpec) -> None:
        """Let the teachers sleep that a step's stage does not use; a call wakes them."""
        used = teachers_of(self.config.stages[spec.stage])
        for name in sorted(self._awake - used):
            self.pools[name].tell("sleep")
        self._awake &= used

    def close(self) -> None:
        """End the watch, and the workers where this stream started them."""
        self._closed.set()
        self._watch.join(timeout=JOIN_SECONDS)
        if self._owned:
            self._workers.close()

    def __enter__(self) -> RayStream:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _encoding(
    sources: list[Any], spec: StepSpec, request: Request, incarnation: int, fed: list[Any]
) -> Send:
    """Return how a step is sent to a teacher, with references to its views where there are any."""

    def send(replica: Any, first: bool) -> Any:
        # What was lost, or is late, is read anew: its views may be what was lost.
        given = fed if first and any(each is not None for each in fed) else ()
        return replica.encode.remote(sources, spec.partitions, request, incarnation, *given)

    return send


def _feeding(
    sources: list[Any], partition: PartitionSpec, split: str, readings: tuple[Reading, ...]
) -> Send:
    """Return how a partition is sent to a feeder, for a reference to each reading."""

    def send(feeder: Any, first: bool) -> Any:
        method = feeder.feed.options(num_returns=len(readings))
        refs = method.remote(sources, partition, split, readings)
        return [refs] if len(readings) == 1 else refs

    return send


def ranks_here() -> tuple[int, int]:
    """Return this process's number among the student's, and how many those are."""
    if not dist.is_initialized():
        return 0, 1
    return dist.get_rank(), dist.get_world_size()
