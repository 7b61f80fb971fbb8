"""SigLIP2 NaFlex through transformers: packed patches of any size, attention pooling as summary."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import Siglip2VisionConfig, Siglip2VisionModel

from teachers.base import HALF, Teacher, TeacherOutput, redraw_constants, seeded, to_map
from teachers.transformers_trunk import trunk_state
from teachers.weights import load_strictly

RELEASES = (
    "google/siglip2-so400m-patch16-naflex",
    "google/siglip2-base-patch16-naflex",
)
# The vision tower's name in Siglip2Model (transformers models/siglip2/modeling_siglip2.py).
PREFIXES = ("vision_model.",)


class SiglipNaflexTeacher(Teacher):
    """A ViT whose positions are resized to each picture's grid, so it takes any size."""

    def __init__(
        self, name: str, model: nn.Module, config: Siglip2VisionConfig, native_size: int
    ) -> None:
        assert isinstance(config.patch_size, int)
        super().__init__(
            name,
            stride=config.patch_size,
            native_size=native_size,
            view_modes=("native", "match"),
            summary_dim=config.hidden_size,
            feature_dim=config.hidden_size,
            mean=HALF,
            std=HALF,
        )
        self.model = model

    def embed(self, pixels: Float[Tensor, "batch 3 height width"]) -> TeacherOutput:
        """Return `pooler_output` as summary and `last_hidden_state` as map."""
        height, width = (side // self.stride for side in pixels.shape[-2:])
        # Upstream reads the shapes one by one as Python numbers, so they stay on the CPU.
        shapes = torch.tensor([[height, width]] * len(pixels), device="cpu")
        output = self.model(
            pixel_values=patchify(pixels, self.stride),
            pixel_attention_mask=None,  # views of one size: nothing is padded
            spatial_shapes=shapes,
        )
        return TeacherOutput(output.pooler_output, to_map(output.last_hidden_state, height, width))


def patchify(
    pixels: Float[Tensor, "batch channels height width"], patch: int
) -> Float[Tensor, "batch patches values"]:
    """Return row-major patches of patch x patch pixels, channels last within a patch.

    As `convert_image_to_patches` of transformers' models/siglip2/image_processing_siglip2.py.
    """
    batch, channels, height, width = pixels.shape
    rows, columns = height // patch, width // patch
    cut = pixels.reshape(batch, channels, rows, patch, columns, patch)
    return cut.permute(0, 2, 4, 3, 5, 1).reshape(batch, rows * columns, patch * patch * channels)


def build(
    name: str,
    pretrained: str | None,
    seed: int,
    *,
    native_size: int,
    patch_size: int,
    width: int,
    mlp_width: int,
    depth: int,
    heads: int,
    position_grid: int,
) -> SiglipNaflexTeacher:
    """Build the vision tower; its own positions are `position_grid` x `position_grid`.

    A checkpoint is a file, folder or hub name in the layout of transformers' Siglip2Model. Raises
    ValueError when `heads` do not divide `width` and for a checkpoint of another model.
    """
    if width % heads:
        raise ValueError(f"teacher '{name}': heads ({heads}) must divide the width {width}")
    state = None
    if pretrained is not None:
        state = trunk_state(name, pretrained, PREFIXES, RELEASES)
    config = Siglip2VisionConfig(
        patch_size=patch_size,
        hidden_size=width,
        intermediate_size=mlp_width,
        num_hidden_layers=depth,
        num_attention_heads=heads,
        num_patches=position_grid**2,
    )
    with seeded(seed):
        model = Siglip2VisionModel(config)
    if state is None:
        redraw_constants(model, seed)
    else:
        load_strictly(name, model, state, str(pretrained))
    return SiglipNaflexTeacher(name, model, config, native_size)
