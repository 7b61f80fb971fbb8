"""An encoder, a teacher and raw pixels as targets."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor

from radio.config import TeacherConfig
from radio.encoder.encoder import Encoder
from radio.encoder.same_teacher import check_teacher
from radio.encoder.text import TextSource
from radio.encoder.weights import Weights
from radio.errors import RadioError
from radio.evaluation.target import MASK_KINDS, OUTPUTS, Target, device, lacks
from teachers import Teacher, build_teacher
from teachers.text import TEXT_KINDS, TextTower, build_text_tower

if TYPE_CHECKING:
    from teachers.sam import MaskDecoder

CELL = 4  # px a side of the cells of `pixels`


class PixelsTarget(Target):
    """The floor that needs no model: raw values as summary, cells' mean colour as features.

    summary: the picture in [0, 1], flattened, at 64 px; features: mean RGB of each 4 x 4 px cell
    and its (x, y) in [0, 1], at 256 px.
    """

    is_kept = False  # as large as the pictures and as quick to make as to read
    SUMMARY_PX = 64

    def __init__(self) -> None:
        fingerprint = hashlib.sha256(f"pixels {CELL}".encode()).hexdigest()
        super().__init__("pixels", fingerprint, OUTPUTS, native_size=256, patch=CELL)

    def size_for(self, name: str) -> int:
        """Return 64 px for the summary, 256 for the features."""
        return self.SUMMARY_PX if name == "summary" else self.native_size

    def extract(
        self, images: UInt8[Tensor, "batch 3 h w"], names: Sequence[str]
    ) -> dict[str, Tensor]:
        """Return the values themselves, and cells [b, 5, h / 4, w / 4]."""
        pixels = images.float() / 255
        found = {"summary": pixels.flatten(1), "features": _cells(pixels)}
        return {name: found[name] for name in names}


def _cells(pixels: Float[Tensor, "batch 3 h w"]) -> Float[Tensor, "batch 5 rows columns"]:
    colours = F.avg_pool2d(pixels, CELL)
    rows, columns = (
        (torch.arange(count) + 0.5) / count for count in (colours.shape[-2], colours.shape[-1])
    )
    y, x = torch.meshgrid(rows, columns, indexing="ij")
    places = torch.stack((x, y)).expand(len(colours), -1, -1, -1)
    return torch.cat((colours, places), dim=1)


class EncoderTarget(Target):
    """An encoder with its adaptors: a folder, NVIDIA's file, or a checkpoint fused in memory."""

    def __init__(self, name: str, weights: Weights) -> None:
        self.encoder = Encoder(weights).to(device())
        self._texts = [
            teacher
            for teacher, heads in weights.teachers.items()
            if "summary" in heads.states
            and TextSource(teacher, heads.facts, heads.dim("summary")).may_have_text
        ]
        self._masks = [
            teacher
            for teacher, heads in weights.teachers.items()
            if "features" in heads.states and heads.facts.get("kind") in MASK_KINDS
        ]
        super().__init__(
            name,
            self.encoder.fingerprint,
            tuple(self.encoder.feature_dims),
            native_size=weights.image_size,
            patch=self.encoder.patch_size,
            facts={teacher: heads.facts for teacher, heads in weights.teachers.items()},
        )

    def check(self, name: str) -> None:
        """Refuse an unknown output, or one that was left out when the encoder was fused."""
        try:
            self.encoder.check_request((name,))
        except RadioError as error:
            raise RadioError(f"target '{self.name}': {error}") from error

    def extract(
        self, images: UInt8[Tensor, "batch 3 h w"], names: Sequence[str]
    ) -> dict[str, Tensor]:
        """Return outputs of one forward; features as maps, finer where a head upsamples."""
        found = self.encoder.encode(images, tuple(names), batch=len(images))
        rows, columns = self.encoder.grid((int(images.shape[-2]), int(images.shape[-1])))
        return {name: _as_map(value.float().cpu(), rows, columns) for name, value in found.items()}

    def text_adaptor(self, adaptor: str | None = None) -> str:
        """Return the named adaptor, or the first, of those that have a text tower."""
        return self._chosen(adaptor, self._texts, "text tower")

    def text_tower(self, adaptor: str | None = None, tokenizer: str | None = None) -> TextTower:
        """Return the tower that the encoder's folder names."""
        chosen = self.text_adaptor(adaptor)
        return self.encoder.text_tower(chosen, tokenizer=tokenizer).cpu()

    def mask_adaptor(self, adaptor: str | None = None) -> str:
        """Return the named adaptor, or the first, of those that stand for a SAM."""
        return self._chosen(adaptor, self._masks, "mask decoder")

    def mask_decoder(self, adaptor: str | None = None) -> MaskDecoder:
        """Return the decoder of the teacher that the encoder's folder names, if still the same."""
        chosen = self.mask_adaptor(adaptor)
        facts = self.facts[chosen]
        missing = [key for key in ("options", "pretrained", "seed") if key not in facts]
        if missing:
            raise RadioError(
                f"target '{self.name}' does not say which mask decoder goes with '{chosen}' (no "
                f"{', no '.join(missing)} in its config.json); fuse it anew from its run"
            )
        check_teacher(chosen, facts, f"'{self.name}'")
        return _mask_decoder(
            facts["kind"], chosen, facts["options"], facts["pretrained"], facts["seed"]
        )

    def _chosen(self, adaptor: str | None, having: Sequence[str], what: str) -> str:
        if adaptor is None and having:
            return having[0]
        if adaptor is not None and adaptor in having:
            return adaptor
        named = f"adaptor '{adaptor}' has" if adaptor is not None else "no adaptor has"
        a = "a" if adaptor is None else "no"
        raise RadioError(
            f"target '{self.name}': {named} {a} {what}; adaptors with one: "
            f"{', '.join(having) or 'none'}; all: {', '.join(self.facts) or 'none'}"
        )


def _as_map(value: Tensor, rows: int, columns: int) -> Tensor:
    if value.ndim == 2:
        return value
    finer = math.isqrt(value.shape[1] // (rows * columns))
    channels_first: Tensor = value.transpose(1, 2)
    return channels_first.reshape(*channels_first.shape[:2], rows * finer, columns * finer)


class TeacherTarget(Target):
    """A frozen teacher with what belongs to it: text tower, mask decoder."""

    def __init__(self, name: str, config: TeacherConfig, seed: int = 0) -> None:
        self.config = config
        self.seed = seed
        try:
            self.teacher: Teacher = build_teacher(
                config.kind, name, dict(config.options), config.pretrained, seed
            )
        except (ValueError, OSError, TypeError) as error:
            raise RadioError(
                f"teacher '{name}' ({config.kind}) cannot be built: {error}"
            ) from error
        self.teacher.to(device())
        has_summary = self.teacher.summary_dim is not None
        super().__init__(
            name,
            self.teacher.fingerprint,
            ("summary", "features") if has_summary else ("features",),
            native_size=self.teacher.native_size,
            patch=self.teacher.stride,
            takes_any_size=self.teacher.takes_any_size,
        )

    @torch.no_grad()
    def extract(
        self, images: UInt8[Tensor, "batch 3 h w"], names: Sequence[str]
    ) -> dict[str, Tensor]:
        """Return the teacher's own outputs."""
        found = self.teacher(self.normalised(images))
        values = {"features": found.features}
        if found.summary is not None:
            values["summary"] = found.summary
        return {name: values[name].float().cpu() for name in names}

    def normalised(self, images: UInt8[Tensor, "batch 3 h w"]) -> Float[Tensor, "batch 3 h w"]:
        """Return pixels in [0, 1] less the teacher's mean over its deviation."""
        pixels = images.to(device()).float() / 255
        mean, std = (
            pixels.new_tensor(v)[:, None, None] for v in (self.teacher.mean, self.teacher.std)
        )
        return (pixels - mean) / std

    def text_adaptor(self, adaptor: str | None = None) -> None:
        """Return None: a teacher's summary is its own; RadioError where its kind has no text."""
        self._own(adaptor, "text tower", TEXT_KINDS)

    def text_tower(self, adaptor: str | None = None, tokenizer: str | None = None) -> TextTower:
        """Return the tower of the same kind, options, weights and seed."""
        self.text_adaptor(adaptor)
        try:
            return build_text_tower(
                self.config.kind,
                self.name,
                dict(self.config.options),
                self.config.pretrained,
                self.seed,
                tokenizer,
            )
        except (ValueError, OSError) as error:
            raise RadioError(f"the text tower of '{self.name}' cannot be built: {error}") from error

    def mask_adaptor(self, adaptor: str | None = None) -> None:
        """Return None: a teacher's features are its own; RadioError where it decodes no masks."""
        self._own(adaptor, "mask decoder", MASK_KINDS)

    def mask_decoder(self, adaptor: str | None = None) -> MaskDecoder:
        """Return the decoder of the same kind, options, weights and seed."""
        self.mask_adaptor(adaptor)
        config = self.config
        return _mask_decoder(config.kind, self.name, config.options, config.pretrained, self.seed)

    def _own(
        self, adaptor: str | None, what: str, kinds: Sequence[str] | Mapping[str, Any]
    ) -> None:
        if self.config.kind not in kinds:
            raise RadioError(lacks(self.name, what, kinds))
        if adaptor is not None:
            raise RadioError(
                f"target '{self.name}' is a teacher and has no adaptor '{adaptor}'; leave it out"
            )


def _mask_decoder(
    kind: str, name: str, options: Mapping[str, Any], pretrained: str | None, seed: int
) -> MaskDecoder:
    from teachers.sam import build_mask_decoder

    try:
        decoder: MaskDecoder = build_mask_decoder(kind, name, dict(options), pretrained, seed)
    except (ValueError, OSError, TypeError) as error:
        raise RadioError(f"the mask decoder of '{name}' cannot be built: {error}") from error
    return decoder
