"""What every teacher is: a frozen module from normalised pixels to a summary and a feature map."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

Channels = tuple[float, float, float]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
HALF = (0.5, 0.5, 0.5)

# timm's and segment_anything's names, then transformers'.
LAYER_SCALES = ("gamma", "gamma_1", "gamma_2", "lambda1")
POSITIONS_AND_TOKENS = (
    "pos_embed",
    "position_embeddings",
    "rel_pos_h",
    "rel_pos_w",
    "cls_token",
    "reg_token",
)


@dataclass(frozen=True)
class TeacherOutput:
    """One summary vector per image (None if the teacher has none) and its feature map."""

    summary: Float[Tensor, "batch summary_dim"] | None
    features: Float[Tensor, "batch feature_dim height width"]


class Teacher(nn.Module, ABC):
    """A frozen model: never trains, never asks for gradients; pixels in [0, 1] less mean over std.

    `view_modes` are the ways an image may be shown to it: "native" (at `native_size`), "match"
    (at the student's grid) and "mosaic" (several views on one native canvas).
    """

    def __init__(
        self,
        name: str,
        *,
        stride: int,
        native_size: int,
        view_modes: Sequence[str],
        summary_dim: int | None,
        feature_dim: int,
        mean: Channels,
        std: Channels,
    ) -> None:
        super().__init__()
        self.name = name
        self.stride = stride
        self.native_size = native_size
        self.view_modes = tuple(view_modes)
        self.summary_dim = summary_dim
        self.feature_dim = feature_dim
        self.takes_any_size = "match" in self.view_modes
        self.mean = mean
        self.std = std
        self._identity = ""
        self._fingerprint: str | None = None

    @abstractmethod
    def embed(self, pixels: Float[Tensor, "batch 3 height width"]) -> TeacherOutput:
        """Return summary and features of pixels whose size has been checked."""

    @torch.no_grad()
    def forward(self, pixels: Float[Tensor, "batch 3 height width"]) -> TeacherOutput:
        """Return summary [b, c] and features [b, d, h / stride, w / stride] of normalised pixels.

        Raises ValueError when a side is no multiple of the stride, or is not the native one for
        a teacher that has no "match" view.
        """
        height, width = pixels.shape[-2:]
        if height % self.stride or width % self.stride:
            raise ValueError(
                f"teacher '{self.name}': pixels are {height} x {width}, "
                f"but both sides must be multiples of its stride {self.stride}"
            )
        if not self.takes_any_size and (height, width) != (self.native_size,) * 2:
            raise ValueError(
                f"teacher '{self.name}': pixels are {height} x {width}, but it only takes its "
                f"native {self.native_size} x {self.native_size}; show it views of the modes "
                f"{', '.join(self.view_modes)}"
            )
        return self.embed(pixels)

    def train(self, mode: bool = True) -> Teacher:
        """Stay in eval mode whatever is asked: a teacher's targets must not depend on dropout."""
        return super().train(False)

    def prepared(self, kind: str, options: dict[str, Any]) -> Teacher:
        """Freeze, cast floating weights to float32 and remember what the fingerprint covers."""
        self._identity = json.dumps([kind, options], sort_keys=True, default=str)
        self.eval().requires_grad_(False)
        return self.float()

    @property
    def fingerprint(self) -> str:
        """Return the SHA-256 (hex) over kind, options and every weight; computed once."""
        if self._fingerprint is None:
            digest = hashlib.sha256(self._identity.encode())
            for key, weight in sorted(self.state_dict().items()):
                digest.update(f"{key} {weight.dtype} {tuple(weight.shape)}".encode())
                flat = weight.detach().cpu().contiguous().reshape(-1)
                digest.update(memoryview(flat.view(torch.uint8).numpy()))
            self._fingerprint = digest.hexdigest()
        return self._fingerprint


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draw weights from `seed` inside and leave torch's CPU generator as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def redraw_constants(module: nn.Module, seed: int) -> None:
    """Redraw in place what libraries initialise to a constant, so that no part is without effect.

    LayerScale becomes U(0.5, 1.5); positions, relative positions and prefix tokens that are all
    zero become N(0, 0.02).
    """
    generator = torch.Generator().manual_seed(seed)
    for key, weight in module.named_parameters():
        leaf = key.rpartition(".")[2]
        if weight.is_meta:
            continue
        if leaf in LAYER_SCALES:
            drawn = torch.empty(weight.shape).uniform_(0.5, 1.5, generator=generator)
        elif leaf in POSITIONS_AND_TOKENS and not weight.any():
            drawn = torch.empty(weight.shape).normal_(0, 0.02, generator=generator)
        else:
            continue
        with torch.no_grad():
            weight.copy_(drawn)


def channels(values: Sequence[float]) -> Channels:
    """Return a value for red, green and blue as a tuple, as a YAML's list gives them."""
    red, green, blue = values
    return float(red), float(green), float(blue)


def to_map(
    tokens: Float[Tensor, "batch tokens channels"], height: int, width: int
) -> Float[Tensor, "batch channels height width"]:
    """Return row-major tokens as a contiguous map."""
    batch, _, channels = tokens.shape
    return tokens.transpose(1, 2).reshape(batch, channels, height, width).contiguous()


def count_running(teacher: Teacher) -> tuple[float, float]:
    """Return (parameters in millions, GFLOP as 2 x MAC for one native image) of what runs.

    A teacher on the meta device is counted without memory or arithmetic.
    """
    device = next(teacher.parameters()).device
    pixels = torch.zeros(1, 3, teacher.native_size, teacher.native_size, device=device)
    counter = FlopCounterMode(display=False)
    with counter:
        teacher(pixels)
    parameters = sum(weight.numel() for weight in teacher.parameters())
    return parameters / 1e6, counter.get_total_flops() / 1e9
