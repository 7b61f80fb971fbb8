"""RayStream: the same batches as LocalStream, with the teachers in actors of their own.

Every call is a pure function of the step's spec, so a lost one is asked again, anywhere. The
stream lives inside the student's process, keeps a window of steps in flight and hands steps out
in order, each exactly once.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import ray
import torch
from ray.exceptions import (
    GetTimeoutError,
    NodeDiedError,
    ObjectLostError,
    RayActorError,
    WorkerCrashedError,
)

from radio.config import Config
from radio.data.plan import StepSpec
from radio.data.shards import ImageSource
from radio.errors import RadioError
from radio.targets.stream import Coded, StepBatch, batches, open_sources, read_by
from radio.targets.target_maker import CodedTarget, Request, TeacherFacts, build_readers
from ray_jobs.teacher_pool import TeacherPool, get, wait_until_ready

log = logging.getLogger("ray_jobs")
LOST = (RayActorError, ObjectLostError, WorkerCrashedError, GetTimeoutError, NodeDiedError)
WINDOW = 2  # measured: two steps in flight overlap fully, four add nothing


@dataclass
class Call:
    """One teacher's outstanding work for one step."""

    ref: Any
    attempt: int = 0


@dataclass(frozen=True)
class Asked:
    """A step in flight: what was asked, and each teacher's call."""

    spec: StepSpec
    calls: dict[str, Call]


class RayStream:
    """Targets from a pool of actors per teacher; needs a connected Ray (`ray_jobs.cluster`).

    Args:
        config: the run.
        sources: its pictures, where the caller has opened them already.
    """

    def __init__(self, config: Config, sources: Mapping[str, ImageSource] | None = None) -> None:
        self.config = config
        self._sources = open_sources(config) if sources is None else sources
        self._readers = build_readers(config, self._sources)
        torch.set_num_threads(config.threads.student)
        self.pools = {name: TeacherPool(config, name, self._sources) for name in config.teachers}
        self.retries = 0
        try:
            self._facts = wait_until_ready(self.pools, config.cluster.give_up_seconds)
        except BaseException:
            self.close()
            raise

    @property
    def teachers(self) -> Mapping[str, TeacherFacts]:
        """Each teacher's dims and fingerprint."""
        return self._facts

    @property
    def sources(self) -> Mapping[str, ImageSource]:
        """The pictures of each split."""
        return self._sources

    def read(
        self, specs: Iterable[StepSpec], request: Request, incarnation: int = 0
    ) -> Iterator[StepBatch]:
        """Yield the specs' batches in order."""
        coded = self.encode(specs, request, incarnation)
        return batches(coded, read_by(self._readers[request.split]), request, self.config)

    def encode(
        self, specs: Iterable[StepSpec], request: Request, incarnation: int = 0
    ) -> Iterator[tuple[StepSpec, Coded]]:
        """Yield each spec in order with its targets, with at most WINDOW steps in flight."""
        waiting = iter(specs)
        in_flight: deque[Asked] = deque()
        self._fill(in_flight, waiting, request, incarnation)
        while in_flight:
            asked = in_flight[0]
            answers = {
                name: self._take(asked.spec, name, call, request, incarnation)
                for name, call in asked.calls.items()
            }
            in_flight.popleft()
            self._fill(in_flight, waiting, request, incarnation)  # before the student computes
            coded = [
                {name: answers[name][number] for name in partition.modes}
                for number, partition in enumerate(asked.spec.partitions)
            ]
            yield asked.spec, coded

    def _fill(
        self,
        in_flight: deque[Asked],
        waiting: Iterator[StepSpec],
        request: Request,
        incarnation: int,
    ) -> None:
        while len(in_flight) < WINDOW and (spec := next(waiting, None)) is not None:
            names = {name for partition in spec.partitions for name in partition.modes}
            calls = {
                name: Call(self._submit(spec, name, 0, request, incarnation))
                for name in self.pools
                if name in names
            }
            in_flight.append(Asked(spec, calls))

    def _submit(
        self, spec: StepSpec, name: str, attempt: int, request: Request, incarnation: int
    ) -> Any:
        replica = self.pools[name].owner(spec.step, attempt)
        return replica.encode.remote(spec.partitions, request, incarnation)

    def _take(
        self, spec: StepSpec, name: str, call: Call, request: Request, incarnation: int
    ) -> list[CodedTarget]:
        """Return one teacher's answer, asking again for as long as it was only lost."""
        started = time.monotonic()
        while True:
            try:
                return list(get(call.ref, self.config.cluster.call_timeout_seconds))
            except LOST as error:
                if time.monotonic() - started > self.config.cluster.give_up_seconds:
                    raise RadioError(
                        f"teacher '{name}' did not answer step {spec.step} after "
                        f"{call.attempt + 1} tries ({type(error).__name__}); see the Ray logs, or "
                        "raise cluster.call_timeout_seconds"
                    ) from error
                if isinstance(error, GetTimeoutError):  # hung: only a new process helps
                    ray.kill(self.pools[name].owner(spec.step, call.attempt), no_restart=False)
                call.attempt += 1
                self.retries += 1
                log.warning(
                    "teacher '%s' was lost in step %d (%s); asking again",
                    name,
                    spec.step,
                    type(error).__name__,
                )
                time.sleep(min(1.0, 0.05 * 2**call.attempt))
                call.ref = self._submit(spec, name, call.attempt, request, incarnation)

    def close(self) -> None:
        """End the teachers' actors."""
        for pool in self.pools.values():
            pool.close()

    def __enter__(self) -> RayStream:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
