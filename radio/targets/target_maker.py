"""One teacher's share of a step: a partition's spec in, standardized and coded targets out.

The same object serves a LocalStream and a Ray actor. It keeps nothing between calls that could
change a result, so a lost call is simply made again, anywhere.
"""

from __future__ import annotations

import hashlib
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from radio.config import Config
from radio.data.plan import PartitionSpec
from radio.data.ranks import micro_shards
from radio.data.shards import ImageSource
from radio.data.views import WHOLE, Framing, ViewReader, Views
from radio.errors import RadioError
from radio.targets import codec
from radio.targets.grid import GRIDS, Grid, to_grid
from radio.targets.standardize import Standardizer, load_standardizers
from radio.targets.upsampler import FileUpsampler
from radio.targets.view_modes import VIEW_MODES, Shown, Sight, ViewMode
from teachers import Teacher, TeacherOutput, build_teacher


@dataclass(frozen=True)
class TeacherFacts:
    """What the student's side must know of a teacher."""

    kind: str
    fingerprint: str
    summary_dim: int | None
    feature_dim: int


@dataclass(frozen=True)
class StandardizerFile:
    """A fitted standardizer by path and SHA-256, so that a worker cannot read another one."""

    path: str
    sha256: str

    @classmethod
    def of(cls, path: Path) -> StandardizerFile:
        """Name the file as it is now."""
        return cls(str(path.resolve()), hashlib.sha256(path.read_bytes()).hexdigest())


@dataclass(frozen=True)
class Request:
    """What is wanted beside the spec: the split, the codec, and each teacher's standardizer.

    A teacher without a standardizer file sends its features as they are (for `fit`).
    """

    split: str
    codec: str
    standardizers: Mapping[str, StandardizerFile]

    @property
    def summary_codec(self) -> str:
        """Summaries are not standardized, so int8 codes do not fit them."""
        return "bf16" if self.codec == "int8" else self.codec


@dataclass(frozen=True)
class CodedTarget:
    """A Target as it travels: plain arrays, the keys used, damaged pictures, seconds busy.

    `offsets` are those of the teacher's views in their crops (`radio.data.views.Views`); `waited`
    are the seconds that the student stood still for this target.
    """

    summary: np.ndarray | None
    features: np.ndarray
    valid: np.ndarray
    keys: tuple[str, ...]
    damaged: Mapping[str, str]
    seconds: float
    offsets: tuple[tuple[int, int], ...] | None = None
    waited: float = 0.0

    @property
    def num_bytes(self) -> int:
        """Bytes of the arrays, as they travel."""
        summary = 0 if self.summary is None else self.summary.nbytes
        return summary + self.features.nbytes + self.valid.nbytes


@dataclass(frozen=True)
class Reading:
    """How somebody sees a partition's views: (height, width) in px, and which part of each crop."""

    size: tuple[int, int]
    framing: Framing

    @classmethod
    def of(
        cls, partition: PartitionSpec, patch_size: int, reader: str, size: tuple[int, int]
    ) -> Reading:
        """Return how `reader` sees them; without a margin all see the same part."""
        framing = Framing.of(partition, patch_size, reader if partition.margin else WHOLE.reader)
        return cls(size, framing)

    def read(self, reader: ViewReader, partition: PartitionSpec) -> Views:
        """Read the views."""
        return reader.batch(partition.views, self.size, self.framing)


def reading_of(config: Config, name: str, partition: PartitionSpec) -> Reading:
    """Return how a run's teacher sees a partition, from its card alone."""
    teacher, patch = config.teachers[name], config.student.patch_size
    sight = Sight(teacher.card, partition, grid_of(partition, patch, teacher.upsample))
    return Reading.of(partition, patch, name, VIEW_MODES[partition.modes[name]].size(sight))


def grid_of(partition: PartitionSpec, patch_size: int, upsample: int) -> Grid:
    """Return (rows, columns) of what the student predicts of a partition for one teacher."""
    height, width = partition.pixels
    side = patch_size // upsample
    return height // side, width // side


class TargetMaker:
    """Make the targets of one frozen teacher.

    Args:
        name: the teacher's name in the run, used in every error.
        kind: the teacher's kind, for its facts.
        teacher: the frozen network.
        readers: a ViewReader per split.
        patch_size: the student's patch in pixels, which decides the student's grid.
        micro_batch: pictures (or canvases) per forward; part of the spec, since the
            composition of a batch may change low bits.
        device: where the forward runs.
        grid: a row of `radio.targets.grid.GRIDS`, of the student's grid and the teacher's.
        upsample: positions along a side that the student predicts for one of its patches.
        upsampler: what view mode `sharpened` calls with features and normalised views.
        compiled: whether torch.compile makes a kernel for every size that the teacher is shown.
        precision: of the forward, float32 or bf16 (autocast, which leaves norms in float32).
    """

    def __init__(
        self,
        name: str,
        kind: str,
        teacher: Teacher,
        readers: Mapping[str, ViewReader],
        patch_size: int,
        micro_batch: int,
        device: torch.device,
        grid: str = "coarser",
        upsample: int = 1,
        upsampler: FileUpsampler | None = None,
        compiled: bool = False,
        precision: str = "float32",
    ) -> None:
        self.name = name
        self.kind = kind
        self.teacher = teacher.to(device)
        self.readers = readers
        self.patch_size = patch_size
        self.micro_batch = micro_batch
        self.device = device
        self.grid = grid
        self.upsample = upsample
        self.upsampler = upsampler
        self.precision = precision
        if compiled:
            self.teacher.compile(dynamic=False)
        self._standardizers: dict[str, Standardizer] = {}
        self._mean = torch.tensor(teacher.mean, device=device).view(1, 3, 1, 1)
        self._std = torch.tensor(teacher.std, device=device).view(1, 3, 1, 1)

    @property
    def facts(self) -> TeacherFacts:
        """Dims and fingerprint, which covers an upsampler."""
        teacher, fingerprint = self.teacher, self.teacher.fingerprint
        if self.upsampler is not None:
            both = f"{fingerprint}/{self.upsampler.sha256}"
            fingerprint = hashlib.sha256(both.encode()).hexdigest()
        return TeacherFacts(self.kind, fingerprint, teacher.summary_dim, teacher.feature_dim)

    def shown(self, partition: PartitionSpec) -> Shown:
        """Return what a view mode needs to know of a partition and this teacher."""
        grid = grid_of(partition, self.patch_size, self.upsample)
        return Shown(self.teacher, partition, grid, self._forward, self.upsampler)

    @torch.inference_mode()
    def __call__(
        self, partition: PartitionSpec, request: Request, views: Views | None = None
    ) -> CodedTarget:
        """Return the coded target of one partition, reading its `views` where none are given.

        Raises:
            RadioError: the teacher returned NaN or infinity, or its standardizer does not fit.
        """
        started = time.perf_counter()
        mode, shown = VIEW_MODES[partition.modes[self.name]], self.shown(partition)
        if views is None:
            reading = Reading.of(partition, self.patch_size, self.name, mode.size(shown))
            views = reading.read(self.readers[request.split], partition)
        output = self._run(mode, partition, self._normalise(views.pixels))
        self._refuse_nan(output, views.keys)
        features = self._standardize(output.features.float(), request)
        grid = GRIDS[self.grid](_grid(features), shown.grid)
        features = to_grid(features, grid)
        valid = np.ones((len(views.keys), *grid), dtype=bool)
        summary = None
        if output.summary is not None:
            summary = codec.encode(output.summary.float().cpu(), request.summary_codec)
        coded = codec.encode(features.cpu(), request.codec)
        seconds = time.perf_counter() - started
        damaged = dict(views.replaced)
        return CodedTarget(summary, coded, valid, views.keys, damaged, seconds, views.offsets)

    def _run(
        self, mode: ViewMode, partition: PartitionSpec, pixels: Float[Tensor, "b 3 h w"]
    ) -> TeacherOutput:
        """Run the teacher over each micro-shard alone: no forward depends on who takes which."""
        shards = micro_shards(partition)
        parts = pixels.split(len(shards[0].views))
        return joined([mode.run(self.shown(s), p) for s, p in zip(shards, parts, strict=True)])

    def _normalise(self, pixels: UInt8[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 h w"]:
        return (pixels.to(self.device).float() / 255 - self._mean) / self._std

    def _forward(self, pixels: Float[Tensor, "b 3 h w"]) -> TeacherOutput:
        half = self.precision == "bf16"
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=half):
            return joined([self.teacher(part) for part in pixels.split(self.micro_batch)])

    def _refuse_nan(self, output: TeacherOutput, keys: tuple[str, ...]) -> None:
        named = {"features": output.features, "summary": output.summary}
        for what, tensor in named.items():
            if tensor is None or bool(torch.isfinite(tensor).all()):
                continue
            finite = torch.isfinite(tensor).flatten(1).all(dim=1).tolist()
            bad = [key for key, fine in zip(keys, finite, strict=True) if not fine]
            raise RadioError(
                f"teacher '{self.name}' returned NaN or infinity in its {what} for "
                f"{', '.join(bad[:5])}; check its weights and precision (norms must stay float32)"
            )

    def _standardize(
        self, features: Float[Tensor, "b c h w"], request: Request
    ) -> Float[Tensor, "b c h w"]:
        file = request.standardizers.get(self.name)
        if file is None:
            return features
        if file.sha256 not in self._standardizers:
            self._standardizers[file.sha256] = self._load(file)
        return self._standardizers[file.sha256].transform_map(features)

    def _load(self, file: StandardizerFile) -> Standardizer:
        try:
            found = StandardizerFile.of(Path(file.path)).sha256
        except OSError as error:
            raise RadioError(
                f"teacher '{self.name}' cannot read {file.path} on {socket.gethostname()} "
                f"({error.strerror}); out= must lie on storage that every node sees"
            ) from error
        if found != file.sha256:
            raise RadioError(
                f"{file.path} changed under the run; run `radio fit` into a new out folder"
            )
        return load_standardizers(Path(file.path))[self.name]


def joined(outputs: Sequence[TeacherOutput]) -> TeacherOutput:
    """Return the outputs of several batches as one."""
    if len(outputs) == 1:
        return outputs[0]
    features = torch.cat([output.features for output in outputs])
    summaries = [output.summary for output in outputs if output.summary is not None]
    return TeacherOutput(torch.cat(summaries) if summaries else None, features)


def build_target_maker(
    config: Config, name: str, readers: Mapping[str, ViewReader], device: torch.device
) -> TargetMaker:
    """Build a run's teacher `name`, reading views by `readers` (one per split).

    Raises:
        RadioError: unknown kind, bad options, missing or unfitting weights; names the teacher.
    """
    wanted = config.teachers[name]
    try:
        teacher = build_teacher(
            wanted.kind, name, dict(wanted.options), wanted.pretrained, config.seed
        )
    except (ValueError, OSError, TypeError) as error:
        raise RadioError(f"teachers.{name} ({wanted.kind}): {error}") from error
    return maker_of(config, name, teacher, readers, device)


def maker_of(
    config: Config,
    name: str,
    teacher: Teacher,
    readers: Mapping[str, ViewReader],
    device: torch.device,
) -> TargetMaker:
    """Put a built teacher to work as the run's `name`.

    Raises:
        RadioError: the teacher is not what its card says.
    """
    wanted = config.teachers[name]
    _check_card(config, name, teacher)
    return TargetMaker(
        name,
        wanted.kind,
        teacher,
        readers,
        config.student.patch_size,
        wanted.micro_batch or config.data.micro_batch,
        device,
        config.losses.grid,
        wanted.upsample,
        None if wanted.upsampler is None else FileUpsampler(wanted.upsampler, device),
        wanted.compile,
        wanted.precision,
    )


def build_readers(config: Config, sources: Mapping[str, ImageSource]) -> dict[str, ViewReader]:
    """Return a ViewReader per split, all with the run's seed and crop scale."""
    low, high = config.data.crop_scale
    return {
        split: ViewReader(source, config.seed, (low, high)) for split, source in sources.items()
    }


def _check_card(config: Config, name: str, teacher: Teacher) -> None:
    card = config.teachers[name].card
    said = (card.summary_dim, card.feature_dim, card.stride, card.native_size)
    is_ = (teacher.summary_dim, teacher.feature_dim, teacher.stride, teacher.native_size)
    if said != is_:
        raise RadioError(
            f"teachers.{name}.card says (summary_dim, feature_dim, stride, native_size) = {said}, "
            f"but the network has {is_}; correct the card"
        )


def _grid(features: Tensor) -> Grid:
    return features.shape[-2], features.shape[-1]
