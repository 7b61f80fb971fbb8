"""The image tower of an open_clip model on a timm trunk, of tokens or convolutional."""

from __future__ import annotations

from typing import Any

import open_clip
import timm
from jaxtyping import Float
from torch import Tensor, nn

from teachers.base import Channels, Teacher, TeacherOutput, to_map


class TrunkTeacher(Teacher):
    """Trunk tokens or its last map as features, the whole tower's output as summary; native only.

    Upstream: open_clip `timm_model.py`.
    """

    def __init__(
        self,
        name: str,
        model: str,
        visual: Any,
        native_size: int,
        mean: Channels,
        std: Channels,
        output_stride: int | None,
    ) -> None:
        config = open_clip.get_model_config(model)
        if output_stride is not None:
            visual.trunk = _dilated(name, config, visual.trunk, output_stride)
        trunk = visual.trunk
        has_tokens = "patch_embed" in dict(trunk.named_children())
        stride = trunk.patch_embed.patch_size[0] if has_tokens else _reduction(trunk)
        super().__init__(
            name,
            stride=int(stride),
            native_size=native_size,
            view_modes=("native",),
            summary_dim=int(config["embed_dim"]),
            feature_dim=int(trunk.num_features),
            mean=mean,
            std=std,
        )
        self.has_tokens = has_tokens
        self.num_prefix_tokens = int(trunk.num_prefix_tokens) if has_tokens else 0
        self.trunk: Any = trunk
        self.head: nn.Module = visual.head

    def embed(self, pixels: Float[Tensor, "batch 3 height width"]) -> TeacherOutput:
        """Run the trunk once: its output is the features, pooled and projected the summary."""
        output = self.trunk.forward_features(pixels)
        summary = self.head(self.trunk.forward_head(output))
        if not self.has_tokens:
            return TeacherOutput(summary, output.contiguous())
        height, width = (side // self.stride for side in pixels.shape[-2:])
        return TeacherOutput(summary, to_map(output[:, self.num_prefix_tokens :], height, width))


def _dilated(name: str, config: dict[str, Any], trunk: Any, output_stride: int) -> Any:
    """Return the trunk with strides turned into dilation: a finer grid from the same weights."""
    model = config["vision_cfg"]["timm_model_name"]
    try:
        finer = timm.create_model(model, num_classes=0, output_stride=output_stride)
    except TypeError as error:
        raise ValueError(
            f"teacher '{name}': timm's {model} has no output_stride; leave the option out"
        ) from error
    finer.load_state_dict(trunk.state_dict())
    return finer


def _reduction(trunk: Any) -> int:
    """Return how many pixels a side of the last map's position covers."""
    return int(trunk.feature_info[-1]["reduction"])
