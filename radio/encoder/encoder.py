"""Encoder: a fused folder, or NVIDIA's published weights, at work."""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from radio.encoder.folder import read_weights
from radio.encoder.images import Picture, Pixels, Size, batches_of, check_size, pair
from radio.encoder.layers import layer_name, layer_names, patches_of, tokens_after
from radio.encoder.shipped import located
from radio.encoder.text import TextSource
from radio.encoder.weights import Weights, build_backbone, build_heads
from radio.errors import RadioError
from student.adaptors import upsampled
from student.timm_trunk import TimmTrunk
from student.token_merging import merge_by, merge_tokens
from student.vit import VisionTransformer
from student.windows import check_window
from teachers.text import TextTower

BATCH = 16  # pictures of a list per forward
NO_BLOCKS = nn.ModuleList()  # of a timm trunk


def load(
    path: str | Path, device: str | torch.device | None = None, dtype: torch.dtype | None = None
) -> Encoder:
    """Load an encoder.

    Args:
        path: a folder of `radio fuse`, NVIDIA's folder or `.pth.tar` file, or the name of an
            encoder that ships (`radio.encoder.shipped`) where there is no such path.
        device: the CPU if not given.
        dtype: of the weights; float32 if not given, whatever they are stored in.

    Raises:
        RadioError: `path` is none of these; the message lists what was expected.
    """
    encoder = Encoder(read_weights(located(path)))
    if device is not None:
        encoder.to(device)
    if dtype is not None:
        encoder.to_dtype(dtype)
    return encoder


class Encoder(nn.Module):
    """A frozen backbone with the heads of its teachers, in the teachers' own spaces."""

    def __init__(self, weights: Weights) -> None:
        super().__init__()
        self.backbone = build_backbone(weights)
        self.heads = build_heads(weights.teachers)
        self.summary_rows = list(weights.summary_rows)
        self.cls_rows = {name: teacher.cls_row for name, teacher in weights.teachers.items()}
        self.upsample = {name: teacher.upsample for name, teacher in weights.teachers.items()}
        self.align_corners = weights.align_corners
        self._left_out = {
            f"{name}:{kind}": why
            for name, teacher in weights.teachers.items()
            for kind, why in teacher.left_out.items()
        }
        self._fingerprint: str | None = None
        self._text = {
            name: TextSource(name, teacher.facts, teacher.dim("summary"))
            for name, teacher in weights.teachers.items()
            if "summary" in teacher.states
        }
        self._towers: dict[str, TextTower] = {}  # no submodules: they are no part of the encoder
        self.eval()

    def train(self, mode: bool = True) -> Encoder:
        """Stay in eval, also as part of a module in training: positions would turn random."""
        super().train(False)
        return self

    @property
    def patch_size(self) -> int:
        """Pixels per token and side."""
        return self.backbone.patch_size

    @property
    def feature_dims(self) -> dict[str, int]:
        """Channels of every feature that `encode` can be asked for, by name; the blocks' last."""
        width = self.backbone.width
        dims = {"summary": width * len(self.summary_rows), "features": width}
        for name, heads in self.heads.items():
            for kind, head in cast(nn.ModuleDict, heads).items():
                outputs = cast(nn.Linear, head.last).out_features
                finer = self.upsample[name] if kind == "features" else 1
                dims[f"{name}:{kind}"] = outputs // finer**2
        blocks = [layer_name(index) for index in range(len(self._blocks))]
        return {**dims, **{name: width for name in blocks if name not in dims}}

    @property
    def feature_names(self) -> tuple[str, ...]:
        """What comes out at the end: summary, features, clip:summary, ...; no layer_0:features."""
        return tuple(name for name in self.feature_dims if name not in self._layers)

    @property
    def _blocks(self) -> nn.ModuleList:
        """The blocks that give layers: our ViT's, whose tokens are one kind from end to end."""
        return self.backbone.blocks if isinstance(self.backbone, VisionTransformer) else NO_BLOCKS

    @property
    def _layers(self) -> dict[str, int]:
        """The blocks' numbers by feature name; a teacher of that name comes first."""
        names = {layer_name(index): index for index in range(len(self._blocks))}
        return {name: i for name, i in names.items() if name.split(":")[0] not in self.heads}

    @property
    def fingerprint(self) -> str:
        """SHA-256 over every weight and what is read from it; computed once."""
        if self._fingerprint is None:
            digest = hashlib.sha256(
                f"{self.summary_rows}{self.cls_rows}{self.align_corners}".encode()
            )
            finer = {name: factor for name, factor in self.upsample.items() if factor > 1}
            digest.update(str(finer or "").encode())
            if isinstance(self.backbone, TimmTrunk):  # other models may have the same tensors
                digest.update(f"{self.backbone.name}{self.backbone.model_args}".encode())
            for key, value in sorted(self.state_dict().items()):
                digest.update(f"{key}{value.dtype}{list(value.shape)}".encode())
                digest.update(value.cpu().reshape(-1).view(torch.uint8).numpy())
            self._fingerprint = digest.hexdigest()
        return self._fingerprint

    def to_dtype(self, dtype: torch.dtype) -> Encoder:
        """Cast the weights, not the normalisation's mean and deviation, and return self."""
        exact = copy.deepcopy(self.backbone.input_conditioner)
        self.to(dtype)
        self.backbone.input_conditioner = exact
        self._fingerprint = None
        return self

    def grid(self, size: Size) -> tuple[int, int]:
        """Return (rows, columns) of tokens of a square's side, or of (height, width), in px.

        Raises:
            RadioError: a size that is no multiple of the patch, with the nearest that are.
        """
        height, width = pair(size)
        check_size(height, width, self.patch_size)
        return height // self.patch_size, width // self.patch_size

    def encode(
        self,
        images: Picture | Sequence[Picture],
        features: Sequence[str] = ("summary", "features"),
        size: Size | None = None,
        merge_to: int | None = None,
        batch: int = BATCH,
        *,
        layers: Sequence[int] = (),
        window: int | None = None,
    ) -> dict[str, Tensor]:
        """Return the features asked for, running only their heads.

        Args:
            images: [B, 3, H, W] or [3, H, W], uint8 or float in [0, 1]; a PIL picture, a path, or
                a list of any of these. Tensors keep their size; PIL pictures and files go to the
                nearest multiple of the patch, aspect kept.
            features: of `feature_dims`; summaries come as [B, D], patches as [B, T, D], row by
                row of `grid(size)`; [B, u u T, D], row by row of a u times finer grid, where
                `upsample` says u for a teacher's features.
            size: side, or (height, width), that every picture is resized to first.
            merge_to: merge the backbone's patches to this many tokens before the heads; adds
                `sizes` [B, K] and `assignment` [B, T] (each patch's token).
            batch: pictures per forward.
            layers: blocks whose patches are wanted too, from 0, or from -1 backwards; each adds
                `layer_<number from 0>:features` [B, T, D], which `features` can name as well.
            window: patches a side of ViTDet's windows, in which most blocks then attend; for a
                backbone that was trained with windows, at sizes whose cost is too high without.

        Raises:
            RadioError: an unknown name or layer, a size that is no multiple of the patch or the
                window, pictures of different sizes without `size`, floats outside [0, 1], or one
                that cannot be decoded.
        """
        wanted = (features,) if isinstance(features, str) else tuple(features)
        wanted += layer_names(layers, len(self._blocks))
        self.check_request(wanted, merge_to)
        parts: dict[str, list[Tensor]] = {}
        for pixels in batches_of(images, self.patch_size, size, batch):
            self._check_window(window, pixels)
            for name, value in self._forward(pixels, wanted, merge_to, window).items():
                parts.setdefault(name, []).append(value)
        # Outside inference mode, so that a probe can be trained on what comes out.
        return {name: torch.cat(values) for name, values in parts.items()}

    @torch.inference_mode()
    def _forward(
        self, pixels: Pixels, wanted: tuple[str, ...], merge_to: int | None, window: int | None
    ) -> dict[str, Tensor]:
        layers = {name: index for name, index in self._layers.items() if name in wanted}
        with tokens_after(self._blocks, layers.values()) as tokens:
            output = self.backbone(pixels.to(self.device), window=window)
        patches = output.features.flatten(2).transpose(1, 2)
        grid = (output.features.shape[-2], output.features.shape[-1])
        inner = {name: patches_of(tokens[i], grid, window) for name, i in layers.items()}
        results: dict[str, Tensor] = {}
        if merge_to is not None:
            merged = merge_tokens(patches, merge_to, grid)
            patches, alike = merged.tokens, torch.ones_like(merged.assignment, dtype=torch.float32)
            count = patches.shape[1]
            inner = {n: merge_by(x, alike, merged.assignment, count)[0] for n, x in inner.items()}
            results = {"sizes": merged.sizes, "assignment": merged.assignment}
        values = {
            name: inner[name] if name in inner else self._feature(name, output.cls, patches, grid)
            for name in wanted
        }
        return {**values, **results}

    def _check_window(self, window: int | None, pixels: Pixels) -> None:
        if window is None:
            return
        if isinstance(self.backbone, TimmTrunk):
            raise RadioError(
                f"window is {window}, but this encoder's backbone is timm's {self.backbone.name}, "
                "and only the blocks of our own ViT attend within windows; leave it out"
            )
        rows, columns = self.grid((int(pixels.shape[-2]), int(pixels.shape[-1])))
        try:
            check_window(window, (rows, columns), self.patch_size, 0)
        except ValueError as error:
            most = math.gcd(rows, columns)
            fitting = ", ".join(str(side) for side in range(1, most + 1) if not most % side)
            raise RadioError(
                f"{error} Windows that fit {rows} x {columns} patches: {fitting}."
            ) from error
        if not any(self.backbone.is_windowed):
            raise RadioError(
                f"window is {window}, but this backbone of {len(self.backbone.blocks)} blocks has "
                "none that attends within windows (vitdet_num_windowed and vitdet_num_global of "
                "its config.json); leave it out"
            )

    @property
    def device(self) -> torch.device:
        """Where the weights lie."""
        return next(self.backbone.parameters()).device

    def encode_text(
        self,
        texts: str | Sequence[str],
        teacher: str = "clip",
        text_weights: str | Path | None = None,
        tokenizer: str | Path | None = None,
    ) -> Float[Tensor, "texts dim"]:
        """Return unit vectors [n, d] to compare with a teacher's unit `<teacher>:summary`.

        The tower is not in the folder: see `text_tower`, which this calls.

        Raises:
            RadioError: no text, no such teacher, or its text tower cannot be had.
        """
        tower = self.text_tower(teacher, text_weights, tokenizer)
        try:
            vectors: Tensor = tower(texts)
        except ValueError as error:
            raise RadioError(str(error)) from error
        return vectors

    def text_tower(
        self,
        teacher: str = "clip",
        text_weights: str | Path | None = None,
        tokenizer: str | Path | None = None,
    ) -> TextTower:
        """Return a teacher's text tower on this encoder's device, built at the first call.

        Args:
            teacher: one with a summary and a text tower: of a kind clip, siglip or siglip_naflex.
            text_weights: the teacher's weights, as `pretrained` in a run's configuration: those
                that it was distilled from (a tag is downloaded) if not given.
            tokenizer: a local folder with its files, for SigLIP; looked for next to local weights,
                or on the hub with weights from there, if not given.

        Raises:
            RadioError: no such teacher, or its text tower cannot be had.
        """
        known = [name for name, source in self._text.items() if source.may_have_text]
        if teacher not in known:
            raise RadioError(
                f"'{teacher}' has no text tower; teachers of this encoder that have one: "
                f"{', '.join(known) or 'none'}"
            )
        if teacher not in self._towers or text_weights is not None or tokenizer is not None:
            self._towers[teacher] = self._text[teacher].build(text_weights, tokenizer)
        return self._towers[teacher].to(self.device)

    def check_request(self, features: Sequence[str], merge_to: int | None = None) -> None:
        """Refuse what this encoder cannot give: RadioError with the known names, or why not."""
        known = ", ".join(self.feature_names)
        if self._blocks:
            last = layer_name(len(self._blocks) - 1)
            known += f"; of its blocks: {layer_name(0)} to {last}"
        if not features:
            raise RadioError(f"no feature is asked for; this encoder has: {known}")
        for name in features:
            if name in self._left_out:
                raise RadioError(f"this encoder cannot give '{name}': {self._left_out[name]}")
            if name not in self.feature_dims:
                raise RadioError(f"unknown feature '{name}'; this encoder has: {known}")
        if merge_to is not None:
            self._check_merging(features, merge_to)

    def _check_merging(self, features: Sequence[str], merge_to: int) -> None:
        if merge_to < 1:
            raise RadioError(f"merge_to is {merge_to}; at least 1 token must be left")
        if all(name.endswith("summary") for name in features):
            dense = ", ".join(n for n in self.feature_names if n.endswith("features"))
            raise RadioError(f"merge_to merges per-patch features; ask for one of: {dense}")
        for name in features:
            finer = self.upsample.get(name.removesuffix(":features"), 1)
            if name.endswith(":features") and finer > 1:
                raise RadioError(
                    f"'{name}' has {finer} x {finer} positions of each patch, which merge_to would "
                    "take apart; ask for it without merge_to"
                )

    def _feature(
        self,
        name: str,
        cls: Float[Tensor, "batch rows width"],
        patches: Float[Tensor, "batch tokens width"],
        grid: tuple[int, int],
    ) -> Tensor:
        if name == "summary":
            return cls[:, self.summary_rows].flatten(1)
        if name == "features":
            return patches
        teacher, kind = name.rsplit(":", 1)
        head = cast(nn.ModuleDict, self.heads[teacher])[kind]
        if kind == "features":
            values: Tensor = head(patches)
            if self.upsample[teacher] == 1:
                return values  # any number of tokens: they may have merged
            return upsampled(values.unflatten(1, grid), self.upsample[teacher]).flatten(1, 2)
        row = self.cls_rows[teacher]
        assert row is not None, "a summary head without a CLS row"
        return cast(Tensor, head(cls[:, row]))
