"""SAM3's trunk through transformers: the last block's output, before the neck; no summary."""

from __future__ import annotations

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor, nn
from transformers import Sam3ViTConfig, Sam3ViTModel

from teachers.base import HALF, Teacher, TeacherOutput, redraw_constants, seeded, to_map
from teachers.transformers_trunk import trunk_state
from teachers.weights import load_strictly

RELEASES = ("facebook/sam3",)
# facebook/sam3 is saved by Sam3VideoModel; then Sam3Model's and Sam3VisionModel's own names
# (transformers models/sam3_video/modeling_sam3_video.py, models/sam3/modeling_sam3.py).
PREFIXES = ("detector_model.vision_encoder.backbone.", "vision_encoder.backbone.", "backbone.")


class Sam3Teacher(Teacher):
    """A ViTDet with windowed attention, axial RoPE and tiled positions, at its native size only.

    Global blocks rotate by positions that are computed for one size (`Sam3ViTLayer` in
    transformers' models/sam3/modeling_sam3.py), so another size is another `image_size`.
    """

    def __init__(self, name: str, trunk: nn.Module, config: Sam3ViTConfig) -> None:
        assert isinstance(config.patch_size, int) and isinstance(config.image_size, int)
        super().__init__(
            name,
            stride=config.patch_size,
            native_size=config.image_size,
            view_modes=("native", "mosaic"),
            summary_dim=None,
            feature_dim=config.hidden_size,
            mean=HALF,
            std=HALF,
        )
        self.trunk = trunk

    def embed(self, pixels: Float[Tensor, "batch 3 height width"]) -> TeacherOutput:
        """Return the trunk's `last_hidden_state`, which the neck would read, as a map."""
        tokens = self.trunk(pixels).last_hidden_state
        height, width = (side // self.stride for side in pixels.shape[-2:])
        return TeacherOutput(None, to_map(tokens, height, width))


def build(
    name: str,
    pretrained: str | None,
    seed: int,
    *,
    image_size: int,
    patch_size: int,
    width: int,
    mlp_width: int,
    depth: int,
    heads: int,
    window_size: int,
    global_attention: Sequence[int],
    position_size: int,
) -> Sam3Teacher:
    """Build SAM3's trunk; `window_size` is in tokens, `image_size` and `position_size` are in px.

    A checkpoint is a file, folder or hub name in the layout of facebook/sam3, whatever its
    `image_size`. Raises ValueError for sizes that do not fit and for a checkpoint of another model.
    """
    if image_size % patch_size:
        below = image_size // patch_size * patch_size
        raise ValueError(
            f"teacher '{name}': image_size {image_size} is no multiple of its patch_size "
            f"{patch_size}; the nearest are {below} and {below + patch_size}"
        )
    if width % (4 * heads):
        raise ValueError(
            f"teacher '{name}': width {width} must be a multiple of 4 x heads ({heads}): "
            "each head rotates pairs for rows and for columns"
        )
    state = None
    if pretrained is not None:
        state = trunk_state(name, pretrained, PREFIXES, RELEASES)
    config = Sam3ViTConfig(
        image_size=image_size,
        patch_size=patch_size,
        hidden_size=width,
        intermediate_size=mlp_width,
        num_hidden_layers=depth,
        num_attention_heads=heads,
        window_size=window_size,
        global_attn_indexes=list(global_attention),
        pretrain_image_size=position_size,
        # Upstream's 0.02 leaves a narrow seeded trunk without any attention to speak of.
        initializer_range=width**-0.5,
    )
    with seeded(seed):
        trunk = Sam3ViTModel(config)
    if state is None:
        redraw_constants(trunk, seed)
    else:
        load_strictly(name, trunk, state, str(pretrained))
    return Sam3Teacher(name, trunk, config)
