"""SigLIP and SigLIP2: an open_clip model on a timm trunk with attention pooling."""

from __future__ import annotations

from teachers.base import HALF
from teachers.open_clip_tower import build_visual
from teachers.open_clip_trunk import TrunkTeacher


def build(
    name: str,
    pretrained: str | None,
    seed: int,
    *,
    model: str,
    image_size: int | None = None,
    output_stride: int | None = None,
) -> TrunkTeacher:
    """Build the tower of an open_clip model with a timm trunk; `image_size` overrides its px.

    `output_stride` dilates the last stages of a convolutional trunk, as timm does.
    """
    visual, side = build_visual(name, model, image_size, pretrained, seed)
    if "trunk" not in dict(visual.named_children()):
        raise ValueError(
            f"teacher '{name}': the visual tower of '{model}' has no timm trunk; "
            "use the kind 'clip' for open_clip's own ViT"
        )
    return TrunkTeacher(name, model, visual, side, HALF, HALF, output_stride)
