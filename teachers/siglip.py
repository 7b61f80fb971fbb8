"""SigLIP and SigLIP2: an open_clip model on a timm trunk with attention pooling."""

from __future__ import annotations

from typing import Any

import open_clip
from jaxtyping import Float
from torch import Tensor, nn

from teachers.base import HALF, Teacher, TeacherOutput, to_map
from teachers.open_clip_tower import build_visual


class SiglipTeacher(Teacher):
    """Trunk tokens as features, the pooled output of the whole tower as summary; native only."""

    def __init__(self, name: str, visual: Any, native_size: int, summary_dim: int) -> None:
        trunk = visual.trunk
        super().__init__(
            name,
            stride=int(trunk.patch_embed.patch_size[0]),
            native_size=native_size,
            view_modes=("native",),
            summary_dim=summary_dim,
            feature_dim=int(trunk.num_features),
            mean=HALF,
            std=HALF,
        )
        self.num_prefix_tokens = int(trunk.num_prefix_tokens)
        self.trunk = trunk
        self.head: nn.Module = visual.head

    def embed(self, pixels: Float[Tensor, "batch 3 height width"]) -> TeacherOutput:
        """Run the trunk once: its tokens are the features, its pooled tokens the summary."""
        tokens = self.trunk.forward_features(pixels)
        summary = self.head(self.trunk.forward_head(tokens))
        height, width = (side // self.stride for side in pixels.shape[-2:])
        return TeacherOutput(summary, to_map(tokens[:, self.num_prefix_tokens :], height, width))


def build(
    name: str, pretrained: str | None, seed: int, *, model: str, image_size: int | None = None
) -> SiglipTeacher:
    """Build the tower of an open_clip model with a timm trunk; `image_size` overrides its px."""
    visual, side = build_visual(name, model, image_size, pretrained, seed)
    if "trunk" not in dict(visual.named_children()):
        raise ValueError(
            f"teacher '{name}': the visual tower of '{model}' has no timm trunk; "
            "use the kind 'clip' for open_clip's own ViT"
        )
    summary_dim = int(open_clip.get_model_config(model)["embed_dim"])
    return SiglipTeacher(name, visual, side, summary_dim)
