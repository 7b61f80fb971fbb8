"""CLIP in open_clip's own ViT: patch tokens before the projection, projected pooled summary."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from teachers.base import Channels, Teacher, TeacherOutput, channels, to_map
from teachers.open_clip_tower import build_visual
from teachers.open_clip_trunk import TrunkTeacher

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


class ClipTeacher(Teacher):
    """The visual tower of open_clip's `transformer.VisionTransformer`, at its native size only."""

    def __init__(self, name: str, visual: Any, side: int, mean: Channels, std: Channels) -> None:
        stride = int(visual.patch_size[0])
        super().__init__(
            name,
            stride=stride,
            native_size=side // stride * stride,
            view_modes=("native",),
            summary_dim=int(visual.output_dim),
            feature_dim=int(visual.conv1.out_channels),
            mean=mean,
            std=std,
        )
        visual.output_tokens = True
        self.visual: nn.Module = visual

    def embed(self, pixels: Float[Tensor, "batch 3 height width"]) -> TeacherOutput:
        """Return the projected pooled token and the patch tokens after `ln_post`."""
        pooled, tokens = self.visual(pixels)
        height, width = (side // self.stride for side in pixels.shape[-2:])
        return TeacherOutput(pooled, to_map(tokens, height, width))


def build(
    name: str,
    pretrained: str | None,
    seed: int,
    *,
    model: str,
    image_size: int | None = None,
    output_stride: int | None = None,
    mean: Sequence[float] = CLIP_MEAN,
    std: Sequence[float] = CLIP_STD,
) -> ClipTeacher | TrunkTeacher:
    """Build the tower of an open_clip model; `image_size` overrides its side in px.

    `output_stride` dilates the last stages of a convolutional trunk of timm; `mean` and `std` are
    for weights that were not trained with CLIP's pixels.
    """
    visual, side = build_visual(name, model, image_size, pretrained, seed)
    children = dict(visual.named_children())
    if "conv1" in children:
        if output_stride is not None:
            raise ValueError(
                f"teacher '{name}': '{model}' is a ViT, which has no output_stride; leave it out"
            )
        return ClipTeacher(name, visual, side, channels(mean), channels(std))
    if "trunk" in children and "patch_embed" not in dict(children["trunk"].named_children()):
        return TrunkTeacher(name, model, visual, side, channels(mean), channels(std), output_stride)
    raise ValueError(
        f"teacher '{name}': the visual tower of '{model}' is neither open_clip's own ViT nor a "
        "convolutional trunk of timm; use the kind 'siglip' for ViTs from timm"
    )
