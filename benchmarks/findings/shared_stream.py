"""A stream whose teachers' own features are cached, and standardized only afterwards.

The engine's cache keeps standardized targets, so that arms with other standardizers share nothing.
Standardizers are affine in every position and resizing weighs positions by shares of 1: one may
come before the other. Teachers may also be scaled here, as if their weights had been.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

from radio.config import Config
from radio.data.plan import StepSpec
from radio.targets import codec
from radio.targets.cache import open_stream
from radio.targets.fit import fit, read_fitted
from radio.targets.standardize import Standardizer
from radio.targets.stream import Coded, LocalStream, StepBatch, Stream, batches, read_by
from radio.targets.target_maker import CodedTarget, Request, StandardizerFile, build_readers


class SharedStream:
    """A LocalStream of teachers times `factors`, over `config.cache` where there is one.

    `deviations` are those that the factors give to the teachers' features, in the views of the fit.
    """

    def __init__(self, config: Config, deviations: Mapping[str, float] | None = None) -> None:
        self.config = config
        self.inner = open_stream(config, lambda: LocalStream(config))
        self.sources = self.inner.sources
        self._readers = build_readers(config, self.sources)
        self._standardizer = functools.cache(_standardizer)
        self.teachers = dict(self.inner.teachers)
        self.factors: dict[str, float] = {}
        own = own_deviations(config, self.inner) if deviations else {}
        for name, wanted in (deviations or {}).items():
            self.factors[name] = wanted / own[name]
            scaled = f"{self.teachers[name].fingerprint} x {self.factors[name]!r}"
            fingerprint = hashlib.sha256(scaled.encode()).hexdigest()
            self.teachers[name] = replace(self.teachers[name], fingerprint=fingerprint)

    def encode(
        self, specs: Iterable[StepSpec], request: Request, incarnation: int = 0
    ) -> Iterator[tuple[StepSpec, Coded]]:
        """Yield each spec with its targets, scaled and standardized."""
        raw = replace(request, standardizers={})
        for spec, coded in self.inner.encode(specs, raw, incarnation):
            yield spec, [{n: self._said(n, t, request) for n, t in part.items()} for part in coded]

    def read(
        self, specs: Iterable[StepSpec], request: Request, incarnation: int = 0
    ) -> Iterator[StepBatch]:
        """Yield the specs' batches in order."""
        coded = self.encode(specs, request, incarnation)
        return batches(coded, read_by(self._readers[request.split]), request, self.config)

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


def own_deviations(config: Config, stream: Stream) -> dict[str, float]:
    """Return each teacher's own deviation, phi = sqrt(mean variance), on the views of the fit."""
    teachers = {
        name: replace(teacher, standardizer="global_scale")
        for name, teacher in config.teachers.items()
    }
    files = fit(replace(config, out=f"{config.out}/unscaled", teachers=teachers), stream)
    return {name: float(fitted.inverse[0, 0]) for name, fitted in read_fitted(files).items()}


def _standardizer(name: str, file: StandardizerFile) -> Standardizer:
    return read_fitted({name: file})[name]
