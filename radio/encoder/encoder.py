"""Encoder: a fused folder, or NVIDIA's published weights, at work."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from radio.encoder.folder import read_weights
from radio.encoder.images import Picture, Pixels, Size, batches_of, check_size, pair
from radio.encoder.weights import EncoderWeights, build_backbone, build_heads
from radio.errors import RadioError
from student.adaptors import upsampled
from student.token_merging import merge_tokens

BATCH = 16  # pictures of a list per forward


def load(
    path: str | Path, device: str | torch.device | None = None, dtype: torch.dtype | None = None
) -> Encoder:
    """Load an encoder.

    Args:
        path: a folder of `radio fuse`, NVIDIA's folder or `.pth.tar` file.
        device: the CPU if not given.
        dtype: of the weights; float32 if not given.

    Raises:
        RadioError: `path` is none of these; the message lists what was expected.
    """
    encoder = Encoder(read_weights(Path(path)))
    if device is not None:
        encoder.to(device)
    if dtype is not None:
        encoder.to_dtype(dtype)
    return encoder


class Encoder(nn.Module):
    """A frozen backbone with the heads of its teachers, in the teachers' own spaces."""

    def __init__(self, weights: EncoderWeights) -> None:
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
        """Channels of every feature that `encode` can be asked for, by name."""
        dims = {
            "summary": self.backbone.width * len(self.summary_rows),
            "features": self.backbone.width,
        }
        for name, heads in self.heads.items():
            for kind, head in cast(nn.ModuleDict, heads).items():
                outputs = cast(nn.Linear, head.last).out_features
                finer = self.upsample[name] if kind == "features" else 1
                dims[f"{name}:{kind}"] = outputs // finer**2
        return dims

    @property
    def feature_names(self) -> tuple[str, ...]:
        """Every name that `encode` can be asked for: summary, features, clip:summary, ..."""
        return tuple(self.feature_dims)

    @property
    def fingerprint(self) -> str:
        """SHA-256 over every weight and what is read from it; computed once."""
        if self._fingerprint is None:
            digest = hashlib.sha256(
                f"{self.summary_rows}{self.cls_rows}{self.align_corners}".encode()
            )
            finer = {name: factor for name, factor in self.upsample.items() if factor > 1}
            digest.update(str(finer or "").encode())
            for key, value in sorted(self.state_dict().items()):
                digest.update(f"{key}{value.dtype}{list(value.shape)}".encode())
                digest.update(value.cpu().contiguous().view(torch.uint8).numpy())
            self._fingerprint = digest.hexdigest()
        return self._fingerprint

    def to_dtype(self, dtype: torch.dtype) -> Encoder:
        """Cast the weights, not the normalisation's mean and deviation, and return self."""
        self.backbone.patch_generator.to(dtype)
        self.backbone.blocks.to(dtype)
        self.heads.to(dtype)
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
    ) -> dict[str, Tensor]:
        """Return the features asked for, running only their heads.

        Args:
            images: [B, 3, H, W] or [3, H, W], uint8 or float in [0, 1]; a PIL picture, a path, or
                a list of any of these. Tensors keep their size; PIL pictures and files go to the
                nearest multiple of the patch, aspect kept.
            features: of `feature_names`; summaries come as [B, D], patches as [B, T, D], row by
                row of `grid(size)`; [B, u u T, D], row by row of a u times finer grid, where
                `upsample` says u for a teacher's features.
            size: side, or (height, width), that every picture is resized to first.
            merge_to: merge the backbone's patches to this many tokens before the heads; adds
                `sizes` [B, K] and `assignment` [B, T] (each patch's token).
            batch: pictures per forward.

        Raises:
            RadioError: an unknown name, a size that is no multiple of the patch, pictures of
                different sizes without `size`, floats outside [0, 1], or one that cannot be
                decoded.
        """
        wanted = (features,) if isinstance(features, str) else tuple(features)
        self.check_request(wanted, merge_to)
        parts: dict[str, list[Tensor]] = {}
        for pixels in batches_of(images, self.patch_size, size, batch):
            for name, value in self._forward(pixels, wanted, merge_to).items():
                parts.setdefault(name, []).append(value)
        # Outside inference mode, so that a probe can be trained on what comes out.
        return {name: torch.cat(values) for name, values in parts.items()}

    @torch.inference_mode()
    def _forward(
        self, pixels: Pixels, wanted: tuple[str, ...], merge_to: int | None
    ) -> dict[str, Tensor]:
        device = self.backbone.patch_generator.pos_embed.device
        output = self.backbone(pixels.to(device))
        patches = output.features.flatten(2).transpose(1, 2)
        grid = (output.features.shape[-2], output.features.shape[-1])
        results: dict[str, Tensor] = {}
        if merge_to is not None:
            merged = merge_tokens(patches, merge_to, grid)
            patches = merged.tokens
            results = {"sizes": merged.sizes, "assignment": merged.assignment}
        values = {name: self._feature(name, output.cls, patches, grid) for name in wanted}
        return {**values, **results}

    def check_request(self, features: Sequence[str], merge_to: int | None = None) -> None:
        """Refuse what this encoder cannot give: RadioError with the known names, or why not."""
        known = ", ".join(self.feature_names)
        if not features:
            raise RadioError(f"no feature is asked for; this encoder has: {known}")
        for name in features:
            if name in self._left_out:
                raise RadioError(f"this encoder cannot give '{name}': {self._left_out[name]}")
            if name not in self.feature_names:
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
