"""SAM: a teacher up to the last block, before the neck; and, apart, what makes masks of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from segment_anything.modeling import (
    ImageEncoderViT,
    PromptEncoder,
    TwoWayTransformer,
)
from segment_anything.modeling import MaskDecoder as SamMaskDecoder
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
NECK = "image_encoder.neck."
DECODER = ("prompt_encoder.", "mask_decoder.")


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
    neck: int = 256,
    decoder: Mapping[str, int] | None = None,
) -> SamTeacher:
    """Build SAM's encoder; a checkpoint is a full SAM's (`sam_vit_h_4b8939.pth` and the like).

    `neck` (channels) and `decoder` (DecoderDims) are read by `build_mask_decoder` alone; the
    defaults are those of every published SAM.
    """
    DecoderDims.of(name, neck, decoder)
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


@dataclass(frozen=True)
class DecoderDims:
    """Sizes of the prompt encoder and mask decoder, by default segment_anything's `_build_sam`."""

    depth: int = 2
    heads: int = 8
    mlp_width: int = 2048
    masks: int = 3
    iou_depth: int = 3
    iou_width: int = 256
    mask_channels: int = 16

    @classmethod
    def of(cls, name: str, neck: int, options: Mapping[str, int] | None) -> DecoderDims:
        """Return the dims that the option `decoder` gives; ValueError for those that cannot be."""
        known = [field.name for field in fields(cls)]
        unknown = sorted(set(options or {}) - set(known))
        if unknown:
            raise ValueError(
                f"teacher '{name}': decoder has no {', '.join(unknown)}; it has {', '.join(known)}"
            )
        dims = cls(**(options or {}))
        # Attention works on half the channels; upscaling keeps an eighth.
        if neck % 8 or neck % (2 * dims.heads):
            raise ValueError(
                f"teacher '{name}': neck is {neck} channels; it must be a multiple of 8 and of "
                f"twice the decoder's {dims.heads} heads"
            )
        return dims


class MaskDecoder(nn.Module):
    """SAM's own neck, prompt encoder and mask decoder, on features that stop before the neck.

    Grids other than the native one get the prompt encoder's positions for theirs, which are
    functions of a place's share of the picture.
    """

    def __init__(self, neck: nn.Module, prompts: Any, masks: Any, width: int) -> None:
        super().__init__()
        self.neck = neck
        self.prompt_encoder: Any = prompts
        self.mask_decoder: Any = masks
        self.width = width

    def forward(
        self,
        features: Float[Tensor, "*one width h w"],
        points: Float[Tensor, "n 2"] | None,
        labels: Tensor | None,
        boxes: Float[Tensor, "n 4"] | None,
        size: int,
    ) -> tuple[Float[Tensor, "n masks h4 w4"], Float[Tensor, "n masks"]]:
        """Return mask logits, four to a feature cell each way, and predicted IoUs per prompt.

        `features` are one picture's; points are (x, y) and boxes (x, y, x, y), in pixels of the
        square input of side `size`; labels are 1 for inside (the default) and 0 for outside.
        Raises ValueError for features of another width and when there is no prompt.
        """
        single = features[None] if features.ndim == 3 else features
        if single.shape[:2] != (1, self.width):
            raise ValueError(
                f"features are {list(features.shape)}; expected one picture's [{self.width}, h, w]"
            )
        if points is None and boxes is None:
            raise ValueError("neither points nor boxes were given; a mask needs a prompt")
        embedded = self.neck(single)
        prompts = None
        if points is not None:
            given = torch.ones(len(points)) if labels is None else labels
            prompts = (self._native(points, size)[:, None], given.to(points)[:, None])
        corners = None if boxes is None else self._native(boxes, size)
        sparse, _ = self.prompt_encoder(points=prompts, boxes=corners, masks=None)
        grid = tuple(embedded.shape[-2:])
        no_mask = self.prompt_encoder.no_mask_embed.weight.reshape(1, -1, 1, 1)
        logits, iou = self.mask_decoder(
            image_embeddings=embedded,
            image_pe=self.prompt_encoder.pe_layer(grid)[None],
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=no_mask.expand(len(sparse), -1, *grid),
            multimask_output=True,
        )
        return logits, iou

    def _native(self, places: Tensor, size: int) -> Tensor:
        """Move pixels' indices to the native input; the prompt encoder adds half a pixel there."""
        native = self.prompt_encoder.input_image_size[0]
        return places if size == native else (places + 0.5) * (native / size) - 0.5


def build_mask_decoder(
    kind: str, name: str, options: Mapping[str, Any], pretrained: str | None, seed: int
) -> MaskDecoder:
    """Build what turns the features of the teacher `name` into masks: frozen, float32.

    Takes the teacher's own kind, options and checkpoint, of which it reads `image_encoder.neck.*`,
    `prompt_encoder.*` and `mask_decoder.*`; None draws them from `seed`. Raises ValueError for a
    kind that has no decoder and for a checkpoint that has no or another one.
    """
    if kind != "sam":
        raise ValueError(
            f"teacher '{name}' of kind '{kind}' has no mask decoder; only kind 'sam' has one"
        )
    width, neck = int(options["width"]), int(options.get("neck", 256))
    dims = DecoderDims.of(name, neck, options.get("decoder"))
    with seeded(seed):
        decoder = _drawn_decoder(
            width, neck, dims, int(options["image_size"]), int(options["patch_size"])
        )
    if pretrained is not None:
        state = decoder_state(_read(name, pretrained))
        if not any(key.startswith("mask_decoder.") for key in state):
            raise ValueError(
                f"teacher '{name}': checkpoint '{pretrained}' holds no mask decoder; give a full "
                "SAM's, with image_encoder.*, prompt_encoder.* and mask_decoder.*"
            )
        load_strictly(name, decoder, state, pretrained)
    return decoder.eval().requires_grad_(False).float()


def decoder_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the part of a full SAM's state dict that `MaskDecoder` holds, in its names."""
    used = {key: value for key, value in state.items() if key.startswith((NECK, *DECODER))}
    return {key.removeprefix(ENCODER): value for key, value in used.items()}


def _drawn_decoder(
    width: int, neck: int, dims: DecoderDims, image_size: int, patch_size: int
) -> MaskDecoder:
    grid = image_size // patch_size
    # The neck is built inside the encoder only; without blocks that costs nothing more.
    encoder = ImageEncoderViT(embed_dim=width, out_chans=neck, depth=0, use_abs_pos=False)
    prompts = PromptEncoder(
        embed_dim=neck,
        image_embedding_size=(grid, grid),
        input_image_size=(image_size, image_size),
        mask_in_chans=dims.mask_channels,
    )
    masks = SamMaskDecoder(
        num_multimask_outputs=dims.masks,
        transformer=TwoWayTransformer(
            depth=dims.depth, embedding_dim=neck, num_heads=dims.heads, mlp_dim=dims.mlp_width
        ),
        transformer_dim=neck,
        iou_head_depth=dims.iou_depth,
        iou_head_hidden_dim=dims.iou_width,
    )
    return MaskDecoder(encoder.neck, prompts, masks, width)


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
