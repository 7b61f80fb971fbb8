"""Frozen teachers in Ray actors: a pool per teacher, each with its own replicas."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping
from typing import Any

import ray
import torch
from ray.exceptions import RayTaskError

from radio.config import Config
from radio.data.plan import PartitionSpec
from radio.data.shards import ImageSource
from radio.errors import RadioError
from radio.targets.stream import device_of
from radio.targets.target_maker import (
    CodedTarget,
    Request,
    TargetMaker,
    TeacherFacts,
    build_readers,
    build_target_maker,
)

log = logging.getLogger("ray_jobs")
STILL_WAITING_SECONDS = 15.0


class TeacherActor:
    """One replica of one teacher.

    The network is built at the first call, not in the constructor: a mistake in the
    configuration then reaches the user as itself, and a restarted replica rebuilds alone.
    """

    def __init__(self, config: Config, name: str, sources: Mapping[str, ImageSource]) -> None:
        self.config = config
        self.name = name
        self.sources = sources
        self.incarnation = 0
        self._maker: TargetMaker | None = None

    @property
    def maker(self) -> TargetMaker:
        """The teacher, built once per process."""
        if self._maker is None:
            torch.set_num_threads(self.config.threads.teacher)
            device = device_of(self.config)
            readers = build_readers(self.config, self.sources)
            self._maker = build_target_maker(self.config, self.name, readers, device)
        return self._maker

    def ready(self) -> TeacherFacts:
        """Build the teacher and return its facts."""
        return self.maker.facts

    def pid(self) -> int:
        """Return the replica's process id."""
        return os.getpid()

    def encode(
        self, partitions: tuple[PartitionSpec, ...], request: Request, incarnation: int
    ) -> list[CodedTarget | None]:
        """Return this teacher's coded targets of a step, None where it is not matched to.

        A call of an older incarnation of the student is refused: its student is dead.
        """
        if incarnation < self.incarnation:
            raise RadioError(
                f"teacher '{self.name}' serves incarnation {self.incarnation} of the student; "
                f"a call of incarnation {incarnation} came late"
            )
        self.incarnation = incarnation
        return [
            self.maker(partition, request) if self.name in partition.modes else None
            for partition in partitions
        ]


class TeacherPool:
    """All replicas of one teacher; `call` routes by step and try, so that no queue is needed."""

    def __init__(self, config: Config, name: str, sources: Mapping[str, ImageSource]) -> None:
        self.name = name
        gpus = 1 if device_of(config).type == "cuda" else 0
        remote = ray.remote(TeacherActor).options(
            num_cpus=1,
            num_gpus=gpus,
            max_restarts=-1,
            max_task_retries=0,  # the stream asks again itself, so that retries are seen
            runtime_env={"env_vars": {"OMP_NUM_THREADS": str(config.threads.teacher)}},
        )
        self.replicas: list[Any] = [
            remote.remote(config, name, sources) for _ in range(config.cluster.replicas)
        ]

    def owner(self, step: int, attempt: int) -> Any:
        """Return the replica that a step's attempt goes to; another attempt, another replica."""
        return self.replicas[(step + attempt) % len(self.replicas)]

    def close(self) -> None:
        """End every replica for good."""
        for replica in self.replicas:
            ray.kill(replica)


def wait_until_ready(
    pools: Mapping[str, TeacherPool], give_up_seconds: float
) -> dict[str, TeacherFacts]:
    """Wait for every replica and return each teacher's facts, saying whom we wait for.

    Raises:
        RadioError: a teacher cannot be built, or got no place in `give_up_seconds`.
    """
    refs: dict[Any, str] = {
        replica.ready.remote(): name for name, pool in pools.items() for replica in pool.replicas
    }
    log.info("starting teachers in Ray actors: %s", ", ".join(pools))
    facts: dict[str, TeacherFacts] = {}
    started = time.monotonic()
    while refs:
        done, _ = ray.wait(list(refs), timeout=STILL_WAITING_SECONDS)
        for ref in done:
            facts[refs.pop(ref)] = get(ref)
        waited = time.monotonic() - started
        missing = ", ".join(sorted(set(refs.values())))
        if refs and waited > give_up_seconds:
            raise RadioError(
                f"no place for teacher {missing} after {waited:.0f} s; the cluster offers "
                f"{ray.available_resources()}; lower cluster.replicas or add nodes"
            )
        if refs and not done:
            log.info("waiting for teacher %s (%.0f s)", missing, waited)
    return {name: facts[name] for name in pools}


def get(ref: Any, timeout: float | None = None) -> Any:
    """Return a call's value; an error of our own arrives as itself, without Ray's traceback."""
    try:
        return ray.get(ref, timeout=timeout)
    except RayTaskError as error:
        if isinstance(error.cause, RadioError):
            raise error.cause from None
        raise
