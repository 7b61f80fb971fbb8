"""CLIP in open_clip's own ViT: patch tokens before the projection, projected pooled summary."""

from __future__ import annotations

from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from teachers.base import Teacher, TeacherOutput, to_map
from teachers.open_clip_tower import build_visual

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


class ClipTeacher(Teacher):
    """The visual tower of open_clip's `transformer.VisionTransformer`, at its native size only."""

    def __init__(self, name: str, visual: Any, side: int) -> None:
        stride = int(visual.patch_size[0])
        super().__init__(
            name,
            stride=stride,
            native_size=side // stride * stride,
            view_modes=("native",),
            summary_dim=int(visual.output_dim),
            feature_dim=int(visual.conv1.out_channels),
            mean=CLIP_MEAN,
            std=CLIP_STD,
        )
        visual.output_tokens = True
        self.visual: nn.Module = visual

    def embed(self, pixels: Float[Tensor, "batch 3 height width"]) -> TeacherOutput:
        """Return the projected pooled token and the patch tokens after `ln_post`."""
        pooled, tokens = self.visual(pixels)
        height, width = (side // self.stride for side in pixels.shape[-2:])
        return TeacherOutput(pooled, to_map(tokens, height, width))


def build(
    name: str, pretrained: str | None, seed: int, *, model: str, image_size: int | None = None
) -> ClipTeacher:
    """Build the tower of an open_clip model; `image_size` overrides its side in px."""
    visual, side = build_visual(name, model, image_size, pretrained, seed)
    if "conv1" not in dict(visual.named_children()):
        raise ValueError(
            f"teacher '{name}': the visual tower of '{model}' is not open_clip's own ViT; "
            "use the kind 'siglip' for towers from timm"
        )
    return ClipTeacher(name, visual, side)
