"""DINOv2 and DINOv3 through timm: normed patch tokens and the normed class token."""

from __future__ import annotations

import sys
from typing import Any

import timm
from jaxtyping import Float
from torch import Tensor

from teachers.base import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    Teacher,
    TeacherOutput,
    redraw_constants,
    seeded,
    to_map,
)
from teachers.weights import load_state, load_strictly, local_file, require_hub


class Dinov2Teacher(Teacher):
    """A timm ViT with a class token, registers and positions for any size."""

    def __init__(self, name: str, model: Any, native_size: int) -> None:
        width = int(model.num_features)
        super().__init__(
            name,
            stride=int(model.patch_embed.patch_size[0]),
            native_size=native_size,
            view_modes=("native", "match"),
            summary_dim=width,
            feature_dim=width,
            mean=IMAGENET_MEAN,
            std=IMAGENET_STD,
        )
        self.num_prefix_tokens = int(model.num_prefix_tokens)
        self.model = model

    def embed(self, pixels: Float[Tensor, "batch 3 height width"]) -> TeacherOutput:
        """Return the class token and the patch tokens after the last norm."""
        tokens = self.model.forward_features(pixels)
        height, width = (side // self.stride for side in pixels.shape[-2:])
        patches = to_map(tokens[:, self.num_prefix_tokens :], height, width)
        return TeacherOutput(tokens[:, 0], patches)


def build(
    name: str,
    pretrained: str | None,
    seed: int,
    *,
    model: str,
    native_size: int,
    **overrides: Any,
) -> Dinov2Teacher:
    """Build a timm model by name; `overrides` go to its constructor (img_size, depth, ...).

    A local checkpoint may be in timm's or in Meta's layout. Raises ValueError for a model without
    a class token.
    """
    path = None if pretrained is None else local_file(name, pretrained)
    tag = pretrained if path is None else None
    identifier = model if tag is None else f"{model}.{tag}"
    if not timm.is_model(model):
        raise ValueError(
            f"teacher '{name}': timm has no model '{model}'; "
            "choose one of timm.list_models('*dinov*')"
        )
    if tag is not None:
        known = [found.rpartition(".")[2] for found in timm.list_pretrained(f"{model}.*")]
        if tag not in known:
            raise ValueError(
                f"teacher '{name}': '{model}' has no weights '{tag}'; "
                f"tags: {', '.join(known) or 'none'}; a local file's path may be given instead"
            )
        require_hub(name, tag, f"the timm weights 'timm/{identifier}'")
    try:
        with seeded(seed):
            vit = timm.create_model(
                identifier,
                pretrained=tag is not None,
                num_classes=0,
                dynamic_img_size=True,
                **overrides,
            )
    except TypeError as error:
        raise ValueError(
            f"teacher '{name}': timm's '{model}' refuses the options {sorted(overrides)}: {error}"
        ) from error
    if getattr(vit, "cls_token", None) is None:
        raise ValueError(
            f"teacher '{name}': timm's '{model}' has no class token, which is this kind's summary; "
            "choose one of timm.list_models('*dinov*')"
        )
    if path is not None:
        # timm keeps each family's conversion next to its class.
        convert = sys.modules[type(vit).__module__].checkpoint_filter_fn
        load_strictly(name, vit, convert(load_state(path), vit), str(path))
    elif tag is None:
        redraw_constants(vit, seed)
    return Dinov2Teacher(name, vit, native_size)
