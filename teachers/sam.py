"""SAM's image encoder: the last block's output, before the neck; no summary."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from segment_anything.modeling import ImageEncoderViT
from torch import Tensor, nn

from teachers.base import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    Teacher,
    TeacherOutput,
    redraw_constants,
    seeded,
)
from teachers.weights import load_state, load_strictly, local_file, require_hub

WEIGHTS = "https://dl.fbaipublicfiles.com/segment_anything/"
RELEASES = ("sam_vit_b_01ec64", "sam_vit_l_0b3195", "sam_vit_h_4b8939")
ENCODER = "image_encoder."
# What a full SAM checkpoint holds beyond the blocks.
UNUSED = ("prompt_encoder.", "mask_decoder.", "image_encoder.neck.", "pixel_mean", "pixel_std")


class SamTeacher(Teacher):
    """A ViTDet with windowed attention and relative positions, at its native size only."""

    def __init__(self, name: str, encoder: Any, patch_size: int, width: int) -> None:
        super().__init__(
            name,
            stride=patch_size,
            native_size=int(encoder.img_size),
            view_modes=("native", "mosaic"),
            summary_dim=None,
            feature_dim=width,
            mean=IMAGENET_MEAN,
            std=IMAGENET_STD,
        )
        self.encoder: nn.Module = encoder

    def embed(self, pixels: Float[Tensor, "batch 3 height width"]) -> TeacherOutput:
        """Return the blocks' output as a map; the neck has been replaced by the identity."""
        return TeacherOutput(None, self.encoder(pixels).contiguous())


def build(
    name: str,
    pretrained: str | None,
    seed: int,
    *,
    image_size: int,
    patch_size: int,
    width: int,
    depth: int,
    heads: int,
    window_size: int,
    global_attention: Sequence[int],
) -> SamTeacher:
    """Build SAM's encoder; a checkpoint is a full SAM's (`sam_vit_h_4b8939.pth` and the like)."""
    with seeded(seed):
        encoder = ImageEncoderViT(
            img_size=image_size,
            patch_size=patch_size,
            embed_dim=width,
            depth=depth,
            num_heads=heads,
            mlp_ratio=4,
            qkv_bias=True,
            norm_layer=partial(nn.LayerNorm, eps=1e-6),
            use_rel_pos=True,
            window_size=window_size,
            global_attn_indexes=tuple(global_attention),
        )
    encoder.neck = nn.Identity()
    if pretrained is None:
        redraw_constants(encoder, seed)
    else:
        load_strictly(name, encoder, encoder_state(_read(name, pretrained)), pretrained)
    return SamTeacher(name, encoder, patch_size, width)


def encoder_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the blocks' part of a full SAM's state dict, in the encoder's own names."""
    used = {key: value for key, value in state.items() if not key.startswith(UNUSED)}
    return {key.removeprefix(ENCODER): value for key, value in used.items()}


def _read(name: str, pretrained: str) -> Mapping[str, Tensor]:
    path = local_file(name, pretrained)
    if path is not None:
        return load_state(path)
    if pretrained not in RELEASES:
        raise ValueError(
            f"teacher '{name}': SAM has no weights '{pretrained}'; "
            f"tags: {', '.join(RELEASES)}; a local file's path may be given instead"
        )
    url = f"{WEIGHTS}{pretrained}.pth"
    require_hub(name, pretrained, url)
    state: Mapping[str, Tensor] = torch.hub.load_state_dict_from_url(
        url, map_location="cpu", weights_only=True
    )
    return state
