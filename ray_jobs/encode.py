"""`radio encode --ray ADDRESS`: blocks of pictures are encoded anywhere, and written here."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import torch

from radio.config import ClusterConfig
from radio.encoder.encoder import load
from radio.extraction.encode import Work, block_of, encoded
from radio.extraction.plan import Row
from radio.extraction.shard_files import Encoded
from ray_jobs.cluster import cluster
from ray_jobs.pool import Ask, Pool, rest

AHEAD = 2  # blocks of rows that a worker has to do


@dataclass(frozen=True)
class Treatment:
    """What every worker must know of the work, its encoder by name or path."""

    model: str
    features: tuple[str, ...]
    size: Any
    merge_to: int | None
    batch: int


class EncoderActor:
    """Encodes rows of a plan by their numbers."""

    def __init__(self, asked: Treatment, threads: int, home: str) -> None:
        torch.set_num_threads(threads)
        if Path(home).is_dir():
            os.chdir(home)
        self.asked = asked
        self._rows: Sequence[Row] = ()
        self._work: Work | None = None

    @property
    def work(self) -> Work:
        """How pictures are treated; the encoder is loaded when it is first needed."""
        if self._work is None:
            asked = self.asked
            encoder = load(asked.model)
            self._work = Work(encoder, asked.features, asked.size, asked.merge_to, asked.batch)
        return self._work

    def ready(self) -> str:
        """Return the fingerprint of encoder and treatment."""
        return self.work.fingerprint

    def pid(self) -> int:
        """Return the process id."""
        return os.getpid()

    def encode(self, plan: list[Any], start: int, stop: int) -> tuple[list[dict[str, Any]], float]:
        """Return what becomes of the rows (the fields of `Encoded` but the row), and the seconds.

        The plan, all rows, comes by a reference inside a list, and is fetched once.
        """
        self._rows = self._rows or ray.get(plan[0])
        started = time.perf_counter()
        found = [dict(vars(item)) for item in encoded(self._rows[start:stop], self.work)]
        for item in found:
            del item["row"]
        return found, time.perf_counter() - started


@contextmanager
def ray_encoded(
    model: str, config: ClusterConfig, workers: int, threads: int | None = None
) -> Iterator[Callable[[Sequence[Row], Work], Iterator[Encoded]]]:
    """Hand out what takes the place of `radio.extraction.encode.encoded`, with workers on Ray.

    The cluster is joined, or made for the time. Blocks of rows are those of a local run, so that
    the same pictures share a forward pass; with as many threads the files are the same, too. A
    worker has `threads`; its share of this machine's cores if not given.
    """

    def encode(rows: Sequence[Row], work: Work) -> Iterator[Encoded]:
        own = threads or max(1, (os.cpu_count() or 1) // workers)
        asked = Treatment(model, work.features, work.size, work.merge_to, work.batch)
        remote: Any = ray.remote(EncoderActor).options(
            num_cpus=1,
            max_restarts=-1,
            max_task_retries=0,
            runtime_env={"env_vars": {"OMP_NUM_THREADS": str(own)}},
        )
        plan = ray.put(rows)  # once, not with every worker
        handles = [remote.remote(asked, own, os.getcwd()) for _ in range(workers)]
        limits = config.call_timeout_seconds, config.give_up_seconds, config.hedge
        pool = Pool("an encoder", handles, *limits, expected=work.fingerprint, depth=AHEAD)
        for replica in pool.replicas:
            replica.knock()  # no work before the encoder is there, and is the one that is here
        with closing(pool):
            yield from _in_order(rows, plan, pool, block_of(work))

    with cluster(config):
        yield encode


def _in_order(rows: Sequence[Row], plan: Any, pool: Pool, size: int) -> Iterator[Encoded]:
    """Yield rows in order, each worker having some blocks ahead."""
    waiting = iter(range(0, len(rows), size))
    in_flight: deque[tuple[int, Ask]] = deque()
    while True:
        while len(in_flight) < AHEAD * len(pool.replicas):
            start = next(waiting, None)
            if start is None:
                break
            in_flight.append(
                (start, pool.ask(_sending(plan, start, size), f"picture {start} and on"))
            )
        if not in_flight:
            return
        start, first = in_flight[0]
        while not pool.poll(first):
            for _, ask in list(in_flight)[1:]:
                pool.poll(ask, is_next=False)
            rest([(pool, first)])
            pool.watch()
        in_flight.popleft()
        found, seconds = first.value
        pool.took(seconds)
        for at, said in enumerate(found, start=start):
            yield Encoded(rows[at], **said)


def _sending(plan: Any, start: int, size: int) -> Callable[[Any, bool], Any]:
    return lambda worker, first: worker.encode.remote([plan], start, start + size)
