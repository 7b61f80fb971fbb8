"""A stream whose teachers' own features are cached, and standardized only afterwards.

The engine's cache keeps standardized targets, so that arms with other standardizers share nothing.
Standardizers are affine in every position and resizing weighs positions by shares of 1: one may
come before the other. Teachers may also be scaled here, as if their weights had been.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import torch

from radio.config import Config
from radio.data.configured import fitting_plan
from radio.data.plan import StepSpec
from radio.data.shards import ImageSource
from radio.targets import codec
from radio.targets.cache import open_stream
from radio.targets.standardize import Standardizer, load_standardizers
from radio.targets.stream import Coded, LocalStream, StepBatch, batches
from radio.targets.target_maker import (
    CodedTarget,
    Request,
    StandardizerFile,
    TeacherFacts,
    build_readers,
)


class SharedStream:
    """A LocalStream of teachers times `factors`, over `config.cache` where there is one."""

    def __init__(self, config: Config, deviations: Mapping[str, float] | None = None) -> None:
        self.config = config
        self.inner = open_stream(config, lambda: LocalStream(config))
        self._readers = build_readers(config, self.inner.sources)
        self._loaded: dict[str, Standardizer] = {}
        self.factors: dict[str, float] = {}
        if deviations is not None:
            own = self._deviations()
            self.factors = {name: deviations[name] / own[name] for name in config.teachers}

    @property
    def teachers(self) -> Mapping[str, TeacherFacts]:
        """Each teacher's dims and fingerprint, which covers its factor."""
        return {name: self._facts(name, facts) for name, facts in self.inner.teachers.items()}

    @property
    def sources(self) -> Mapping[str, ImageSource]:
        """The pictures of each split."""
        return self.inner.sources

    def encode(
        self, specs: Iterable[StepSpec], request: Request, incarnation: int = 0
    ) -> Iterator[tuple[StepSpec, Coded]]:
        """Yield each spec with its targets, scaled and standardized."""
        raw = replace(request, standardizers={})
        for spec, coded in self.inner.encode(specs, raw, incarnation):
            yield (
                spec,
                [
                    {name: self._said(name, target, request) for name, target in part.items()}
                    for part in coded
                ],
            )

    def read(
        self, specs: Iterable[StepSpec], request: Request, incarnation: int = 0
    ) -> Iterator[StepBatch]:
        """Yield the specs' batches in order."""
        coded = self.encode(specs, request, incarnation)
        return batches(coded, self._readers[request.split], request, self.config)

    def close(self) -> None:
        """Let the teachers go."""
        self.inner.close()

    def _said(self, name: str, target: CodedTarget, request: Request) -> CodedTarget:
        file = request.standardizers.get(name)
        if file is None and name not in self.factors:
            return target
        features = codec.decode(target.features, request.codec) * self.factors.get(name, 1.0)
        if file is not None:
            features = self._standardizer(name, file).transform_map(features)
        return replace(target, features=codec.encode(features, request.codec))

    def _standardizer(self, name: str, file: StandardizerFile) -> Standardizer:
        if file.sha256 not in self._loaded:
            self._loaded[file.sha256] = load_standardizers(Path(file.path))[name]
        return self._loaded[file.sha256]

    def _facts(self, name: str, facts: TeacherFacts) -> TeacherFacts:
        if name not in self.factors:
            return facts
        scaled = f"{facts.fingerprint} x {self.factors[name]!r}"
        return replace(facts, fingerprint=hashlib.sha256(scaled.encode()).hexdigest())

    @torch.no_grad()
    def _deviations(self) -> dict[str, float]:
        """Return each teacher's own deviation, phi = sqrt(mean variance), on the views of the fit.

        Those views are the fit's own, so that it finds exactly the deviations that are asked for.
        """
        plan = fitting_plan(self.config, len(self.sources["train"]))
        found = {
            name: Standardizer("global_scale", facts.feature_dim, name)
            for name, facts in self.inner.teachers.items()
        }
        specs = (plan(step) for step in range(plan.num_steps))
        for batch in self.inner.read(specs, Request("train", "float32", {})):
            for partition in batch.partitions:
                for name, target in partition.targets.items():
                    found[name].partial_fit(target.features.movedim(1, -1)[target.valid])
        return {name: float(fit.fit().inverse[0, 0]) for name, fit in found.items()}
