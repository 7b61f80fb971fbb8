"""CachedStream: targets of views that repeat are made once, kept in a folder and found again.

What is kept is one teacher's coded target of one micro-shard of one step, which comes back whole,
as `data.repeat_epochs` repeats whole steps. Its key covers everything that decides its bits but
the machine and the versions of the libraries.
"""

from __future__ import annotations

import itertools
import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from radio.config import Config
from radio.data.plan import PartitionSpec, StepSpec
from radio.data.ranks import micro_shards
from radio.data.shards import ImageSource
from radio.errors import RadioError
from radio.targets.cache_key import identity, target_key
from radio.targets.entries import Entry, EntryFolder, key_of
from radio.targets.stream import Coded, StepBatch, Stream, batches, open_sources, read_by
from radio.targets.target_maker import CodedTarget, Request, TeacherFacts, build_readers

log = logging.getLogger("radio.cache")
SECONDS = ("seconds", "waited")  # of a target, which differ each time


def open_stream(
    config: Config,
    live: Callable[[], Stream],
    sources: Mapping[str, ImageSource] | None = None,
) -> Stream:
    """Return the run's stream: `live()`, or with `cache` a CachedStream that calls it when needed.

    Raises:
        RadioError: `cache` with views that never repeat.
    """
    return live() if config.cache is None else CachedStream(config, live, sources)


class CachedStream:
    """Targets out of `config.cache`; the teachers start at the first that is not there.

    Args:
        config: the run; other runs and processes may use its `cache` folder at the same time.
        live: makes the stream that is asked for what is missing.
        sources: the run's pictures, where the caller has opened them already.

    Recipe: targets of augmented views kept and replayed; ours; cache, data.repeat_epochs;
    tests/test_cache.py::test_training_from_the_cache_is_training_live_without_a_teacher.
    """

    def __init__(
        self,
        config: Config,
        live: Callable[[], Stream],
        sources: Mapping[str, ImageSource] | None = None,
    ) -> None:
        assert config.cache is not None, "open_stream asks"
        self.config = config
        self.entries = EntryFolder(Path(config.cache))
        self.hits = self.misses = 0
        self._sources = open_sources(config) if sources is None else sources
        self._readers = build_readers(config, self._sources)
        self._live = live
        self._stream: Stream | None = None
        self._identities = {name: identity(config, name) for name in config.teachers}
        known = {name: self._known_facts(name) for name in config.teachers}
        self._facts = {name: facts for name, facts in known.items() if facts is not None}
        torch.set_num_threads(config.threads.student)

    @property
    def teachers(self) -> Mapping[str, TeacherFacts]:
        """Each teacher's dims and fingerprint, which the folder tells without starting it."""
        if len(self._facts) < len(self.config.teachers):
            self._started()
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
        """Yield each spec in order with its targets, asking the teachers for the missing ones.

        Raises:
            RadioError: the folder cannot be written, or a teacher is another one than it was.
        """
        whole: deque[StepSpec] = deque()

        def in_shards() -> Iterator[StepSpec]:
            for spec in specs:
                whole.append(spec)
                yield _in_shards(spec)

        for _, coded in self._encode(in_shards(), request, incarnation):
            spec = whole.popleft()
            yield spec, _joined(spec, coded)

    def _encode(
        self, specs: Iterable[StepSpec], request: Request, incarnation: int
    ) -> Iterator[tuple[StepSpec, Coded]]:
        looked_up = ((spec, self._look_up(spec, request)) for spec in specs)
        for spec, found in looked_up:
            if any(partition.modes for partition in _missing(spec, found).partitions):
                rest = itertools.chain([(spec, found)], looked_up)
                yield from self._complete(rest, request, incarnation)
                return
            yield spec, found

    def _look_up(self, spec: StepSpec, request: Request) -> Coded:
        """Return those of a step's targets that are there."""
        coded: Coded = []
        for partition in spec.partitions:
            found = {}
            for name in partition.modes:
                entry = self.entries.get(self._key(partition, name, request), _what(name))
                if entry is not None:
                    found[name] = _target(entry)
            self.hits += len(found)
            self.misses += len(partition.modes) - len(found)
            coded.append(found)
        return coded

    def _complete(
        self, looked_up: Iterator[tuple[StepSpec, Coded]], request: Request, incarnation: int
    ) -> Iterator[tuple[StepSpec, Coded]]:
        """Yield steps with what the live stream says where nothing was found, and keep it.

        It is told every step, if only to make nothing, so that it looks ahead as it does alone.
        """
        waiting: deque[tuple[StepSpec, Coded]] = deque()

        def missing() -> Iterator[StepSpec]:
            for spec, found in looked_up:
                waiting.append((spec, found))
                yield _missing(spec, found)

        for _, answers in self._started().encode(missing(), request, incarnation):
            spec, found = waiting.popleft()
            coded: Coded = []
            for partition, known, made in zip(spec.partitions, found, answers, strict=True):
                for name, target in made.items():
                    key = self._key(partition, name, request)
                    self.entries.put(key, _entry(target), _what(name))
                both = known | made
                coded.append({name: both[name] for name in partition.modes})
            yield spec, coded

    def _key(self, partition: PartitionSpec, name: str, request: Request) -> str:
        teacher = self._identities[name], self.teachers[name].fingerprint
        source = self._sources[request.split]
        return target_key(self.config, name, teacher, source, partition, request)

    def _started(self) -> Stream:
        """Return the live stream, started once; its teachers must be those of the folder."""
        if self._stream is None:
            self._stream = self._live()
            for name, facts in self._stream.teachers.items():
                self._remember(name, facts)
            self._facts = dict(self._stream.teachers)
        return self._stream

    def _remember(self, name: str, facts: TeacherFacts) -> None:
        known = self._known_facts(name)
        if known is None:
            key = self._facts_key(name)
            self.entries.put(key, Entry({}, asdict(facts)), f"the facts of teacher '{name}'")
        elif known != facts:
            raise RadioError(
                f"teacher '{name}' is another one than when cache={self.config.cache} was filled, "
                f"though teachers.{name} says the same (its fingerprint was "
                f"{known.fingerprint[:12]}, now {facts.fingerprint[:12]}); give it back its "
                "weights, or choose another cache="
            )

    def _known_facts(self, name: str) -> TeacherFacts | None:
        entry = self.entries.get(self._facts_key(name), f"the facts of teacher '{name}'")
        return None if entry is None else TeacherFacts(**entry.said)

    def _facts_key(self, name: str) -> str:
        kept = [field.name for field in fields(TeacherFacts)]
        return key_of({"facts of": self._identities[name], "kept": kept})

    def close(self) -> None:
        """Let the teachers go, where they were started, and log what the cache was good for."""
        if self._stream is not None:
            self._stream.close()
        log.info(
            "cache %s: %d targets found (%.1f MB), %d made (%.1f MB)%s",
            self.config.cache,
            self.hits,
            self.entries.bytes_read / 1e6,
            self.misses,
            self.entries.bytes_written / 1e6,
            "" if self._stream is not None else "; no teacher was started",
        )


def _missing(spec: StepSpec, found: Coded) -> StepSpec:
    """Return the step with only those teachers in its modes that were not found."""
    partitions = []
    for partition, known in zip(spec.partitions, found, strict=True):
        modes = {name: mode for name, mode in partition.modes.items() if name not in known}
        partitions.append(replace(partition, modes=modes))
    return replace(spec, partitions=tuple(partitions))


def _in_shards(spec: StepSpec) -> StepSpec:
    """Return the step with each micro-shard as a partition of its own.

    A process takes whole ones, and no forward mixes two, so that what is kept does not depend on
    how many processes there are.
    """
    shards = [shard for partition in spec.partitions for shard in micro_shards(partition)]
    return replace(spec, partitions=tuple(shards))


def _joined(spec: StepSpec, coded: Coded) -> Coded:
    """Return the targets of a step's whole partitions from those of their micro-shards."""
    rest = iter(coded)
    joined: Coded = []
    for partition in spec.partitions:
        parts = list(itertools.islice(rest, len(partition.shards)))
        joined.append({name: _one([part[name] for part in parts]) for name in partition.modes})
    return joined


def _one(targets: Sequence[CodedTarget]) -> CodedTarget:
    """Return one teacher's targets of several micro-shards as one."""
    if len(targets) == 1:
        return targets[0]
    summaries = [target.summary for target in targets if target.summary is not None]
    offsets = [target.offsets for target in targets if target.offsets is not None]
    return CodedTarget(
        np.concatenate(summaries) if summaries else None,
        np.concatenate([target.features for target in targets]),
        np.concatenate([target.valid for target in targets]),
        tuple(key for target in targets for key in target.keys),
        {key: reason for target in targets for key, reason in target.damaged.items()},
        sum(target.seconds for target in targets),
        tuple(pair for each in offsets for pair in each) if offsets else None,
        sum(target.waited for target in targets),
    )


def _what(name: str) -> str:
    return f"a target of teacher '{name}'"


def _entry(target: CodedTarget) -> Entry:
    """Return what is kept: all but the seconds, so that a target has the same bytes each time."""
    values = {
        field.name: getattr(target, field.name)
        for field in fields(target)
        if field.name not in SECONDS
    }
    arrays = {name: value for name, value in values.items() if isinstance(value, np.ndarray)}
    return Entry(arrays, {name: value for name, value in values.items() if name not in arrays})


def _target(entry: Entry) -> CodedTarget:
    """Return what was kept; no teacher was busy for it."""
    values = dict(entry.arrays) | {name: _tuples(value) for name, value in entry.said.items()}
    return CodedTarget(**values, seconds=0.0)


def _tuples(value: Any) -> Any:
    """Turn JSON's lists back into tuples, at any depth."""
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
