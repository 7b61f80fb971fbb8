"""Encoder: the fused folder at work."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image, ImageOps
from safetensors.torch import load_file
from torch import Tensor, nn

from radio.data.decode import DamagedImage, decode
from radio.encoder.layout import build_backbone, from_disk
from radio.errors import RadioError
from student.model import TeacherAdaptor, TeacherDims
from student.token_merging import merge_tokens
from student.vit import VisionTransformer

Picture = Tensor | Image.Image | str | Path
Size = int | tuple[int, int]


def load(path: str | Path, device: str | torch.device = "cpu") -> Encoder:
    """Load an encoder folder: one of `radio fuse`, or NVIDIA's backbone files as transformers
    reads them (without heads).

    Raises:
        RadioError: the folder is not there, or its files are not an encoder's.
    """
    folder = Path(path)
    missing = [n for n in ("config.json", "model.safetensors") if not (folder / n).exists()]
    if missing:
        raise RadioError(
            f"{folder} is no encoder folder: {', '.join(missing)} missing; make one with "
            "`radio fuse RUN FOLDER`"
        )
    config = json.loads((folder / "config.json").read_text())
    state, rows = from_disk(load_file(folder / "model.safetensors"))
    backbone = build_backbone(state, int(config["num_cls_tokens"]))
    heads = config.get("adaptors", {})
    adaptors = nn.ModuleDict(
        {name: _adaptor(backbone.width, block) for name, block in heads.items()}
    )
    if heads:
        adaptors.load_state_dict(load_file(folder / "adaptors.safetensors"))
    return Encoder(backbone, adaptors, rows).to(device).eval()


def _adaptor(width: int, block: dict[str, Any]) -> TeacherAdaptor:
    dims = TeacherDims(block["summary_dim"], block["feature_dim"])
    return TeacherAdaptor(width, dims, block["cls_row"], block["hidden"], block["depth"])


class Encoder(nn.Module):
    """A backbone with the heads of its teachers, in the teachers' own spaces."""

    def __init__(
        self, backbone: VisionTransformer, adaptors: nn.ModuleDict, summary_rows: Sequence[int]
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.adaptors = adaptors
        self.summary_rows = list(summary_rows)

    @property
    def patch_size(self) -> int:
        """Pixels per token."""
        return self.backbone.patch_size

    @property
    def feature_names(self) -> tuple[str, ...]:
        """Every name that `encode` can be asked for."""
        names = ["summary", "features"]
        for teacher, adaptor in self.adaptors.items():
            if adaptor.summary is not None:
                names.append(f"{teacher}:summary")
            names.append(f"{teacher}:features")
        return tuple(names)

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Return (rows, columns) of tokens of a picture that fits the patch."""
        return height // self.patch_size, width // self.patch_size

    @torch.inference_mode()
    def encode(
        self,
        images: Picture | Sequence[Picture],
        features: Sequence[str] = ("summary", "features"),
        size: Size | None = None,
        merge_to: int | None = None,
    ) -> dict[str, Tensor]:
        """Return the features asked for, running only their heads.

        Args:
            images: [B, 3, H, W] or [3, H, W], uint8 or float in [0, 1]; or PIL pictures or paths.
                Tensors keep their size; files and PIL pictures go to the nearest multiple of
                the patch, aspect kept.
            features: of `feature_names`; per-patch features come as [B, T, D].
            size: side, or (height, width), that every picture is resized to first.
            merge_to: merge patch features to this many tokens; adds `sizes` and `assignment`.

        Raises:
            RadioError: an unknown name, a size that is no multiple of the patch, pictures of
                different sizes without `size`, or one that cannot be decoded.
        """
        self.check_names(features)
        pixels = self.prepare(images, size)
        output = self.backbone(pixels.to(next(self.parameters()).device))
        patches = output.features.flatten(2).transpose(1, 2)
        results: dict[str, Tensor] = {}
        if merge_to is not None:
            grid = self.grid(pixels.shape[-2], pixels.shape[-1])
            merged = merge_tokens(patches, merge_to, grid)
            patches = merged.tokens
            results |= {"sizes": merged.sizes, "assignment": merged.assignment}
        for name in features:
            results[name] = self._head(name, output.cls, patches)
        return results

    def check_names(self, features: Iterable[str]) -> None:
        """Refuse a name that this encoder cannot give."""
        unknown = [name for name in features if name not in self.feature_names]
        if unknown:
            known = ", ".join(self.feature_names)
            raise RadioError(f"unknown features {', '.join(unknown)}; this encoder has: {known}")

    def _head(
        self, name: str, cls: Float[Tensor, "b n c"], patches: Float[Tensor, "b t c"]
    ) -> Tensor:
        if name == "summary":
            return cls[:, self.summary_rows].flatten(1)
        if name == "features":
            return patches
        teacher, what = name.rsplit(":", 1)
        adaptor = self.adaptors[teacher]
        assert isinstance(adaptor, TeacherAdaptor)
        if what == "features":
            return cast(Tensor, adaptor.features(patches))
        assert adaptor.summary is not None and adaptor.cls_row is not None
        return cast(Tensor, adaptor.summary(cls[:, adaptor.cls_row]))

    def prepare(self, images: Picture | Sequence[Picture], size: Size | None = None) -> Tensor:
        """Return one batch [B, 3, H, W] of pictures, sized as `encode` says."""
        if isinstance(images, Tensor):
            batch = images if images.ndim == 4 else images[None]
            return self._fitting(batch if size is None else _resize(batch, _pair(size)))
        several = [images] if isinstance(images, (Image.Image, str, Path)) else list(images)
        if not several:
            raise RadioError("no pictures were given")
        pictures = [self._picture(picture, size) for picture in several]
        sizes = sorted({tuple(picture.shape[-2:]) for picture in pictures})
        if len(sizes) > 1:
            shown = ", ".join(f"{h}x{w}" for h, w in sizes[:5])
            raise RadioError(
                f"pictures of different sizes in one batch ({shown}); pass size=, or encode them "
                "one by one"
            )
        return torch.stack(pictures)

    def _picture(self, picture: Picture, size: Size | None) -> Tensor:
        if isinstance(picture, Tensor):
            return self.prepare(picture, size)[0]
        image = _open(picture)
        height, width = self.size_for(image.height, image.width) if size is None else _pair(size)
        self._check_size(height, width)
        resized = image.resize((width, height), Image.Resampling.BICUBIC)
        return torch.from_numpy(np.asarray(resized).copy()).permute(2, 0, 1)

    def size_for(self, height: int, width: int) -> tuple[int, int]:
        """Return the nearest (height, width) of whole patches, at least one each way."""
        patch = self.patch_size
        return max(1, round(height / patch)) * patch, max(1, round(width / patch)) * patch

    def _fitting(self, batch: Tensor) -> Tensor:
        self._check_size(batch.shape[-2], batch.shape[-1])
        return batch

    def _check_size(self, height: int, width: int) -> None:
        if height % self.patch_size or width % self.patch_size:
            near = "x".join(map(str, self.size_for(height, width)))
            raise RadioError(
                f"{height}x{width} px is no multiple of the patch {self.patch_size}; the nearest "
                f"size is {near}"
            )


def _pair(size: Size) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else size


def _open(picture: Image.Image | str | Path) -> Image.Image:
    if isinstance(picture, Image.Image):
        return ImageOps.exif_transpose(picture).convert("RGB")
    try:
        return decode(Path(picture).read_bytes())
    except DamagedImage as error:
        raise RadioError(f"{picture}: {error}") from error
    except OSError as error:
        raise RadioError(f"cannot read {picture}: {error}") from error


def _resize(batch: Tensor, size: tuple[int, int]) -> Tensor:
    pixels = batch if batch.is_floating_point() else batch.float() / 255
    if tuple(pixels.shape[-2:]) == size:
        return pixels
    resized = nn.functional.interpolate(pixels, size=size, mode="bicubic", antialias=True)
    return resized.clamp(0, 1)
