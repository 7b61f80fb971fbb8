"""An encoder of the RADIO family as a teacher, read by transformers from its own folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import transformers
from jaxtyping import Float
from torch import Tensor, nn

from teachers.base import Teacher, TeacherOutput, seeded, to_map
from teachers.transformers_trunk import HUB_NAME
from teachers.weights import require_hub


class EncoderTeacher(Teacher):
    """The backbone of a `RadioModel`; it normalises pixels itself, so mean is 0 and std is 1."""

    def __init__(self, name: str, model: transformers.RadioModel, native_size: int) -> None:
        config = model.config
        super().__init__(
            name,
            stride=int(config.patch_size),
            native_size=native_size,
            view_modes=("native", "match"),
            summary_dim=int(config.hidden_size) * len(model.summary_idxs),
            feature_dim=int(config.hidden_size),
            mean=(0.0, 0.0, 0.0),
            std=(1.0, 1.0, 1.0),
        )
        self.model: nn.Module = model

    def embed(self, pixels: Float[Tensor, "batch 3 height width"]) -> TeacherOutput:
        """Return the model's summary (its class tokens side by side) and patch features."""
        output = self.model(pixel_values=pixels)
        height, width = (side // self.stride for side in pixels.shape[-2:])
        return TeacherOutput(output.summary, to_map(output.features, height, width))


class TimmEncoderTeacher(Teacher):
    """The timm trunk of an encoder, as transformers' `TimmWrapperModel`; it has no summary.

    The pooling that makes an encoder's summary of it is beside what transformers reads.
    """

    def __init__(self, name: str, model: transformers.TimmWrapperModel, native_size: int) -> None:
        config = model.config
        mean, std = (tuple(config.pretrained_cfg[key]) for key in ("mean", "std"))
        super().__init__(
            name,
            stride=int(config.patch_size),
            native_size=native_size,
            view_modes=("native", "match"),
            summary_dim=None,
            feature_dim=int(config.num_features),
            mean=mean,
            std=std,
        )
        trunk: Any = model.timm_model
        # Only timm's ViTs have prefix tokens, and only models with another order name it.
        self.num_prefix = int(getattr(trunk, "num_prefix_tokens", 0))
        self.is_channels_last = getattr(trunk, "output_fmt", "NCHW") == "NHWC"
        self.model: nn.Module = model

    def embed(self, pixels: Float[Tensor, "batch 3 height width"]) -> TeacherOutput:
        """Return what timm's `forward_features` gives, in whatever order, as a feature map."""
        found: Tensor = self.model(pixel_values=pixels).last_hidden_state
        if found.ndim == 3:
            height, width = (side // self.stride for side in pixels.shape[-2:])
            return TeacherOutput(None, to_map(found[:, self.num_prefix :], height, width))
        return TeacherOutput(None, found.permute(0, 3, 1, 2) if self.is_channels_last else found)


KINDS: dict[str, tuple[Any, type[EncoderTeacher] | type[TimmEncoderTeacher]]] = {
    "radio": (transformers.RadioModel, EncoderTeacher),
    "timm_wrapper": (transformers.TimmWrapperModel, TimmEncoderTeacher),
}


def build(
    name: str, pretrained: str | None, seed: int, *, folder: str, native_size: int
) -> EncoderTeacher | TimmEncoderTeacher:
    """Read `config.json` of a folder or hub name and, unless seeded, its weights.

    `pretrained` is null for seeded weights, or a folder or hub name whose weights are read.
    Raises ValueError for a folder that does not exist, another model's, or a download when offline.
    """
    for place in (folder, pretrained):
        if place is not None:
            _check_place(name, place)
    config = transformers.AutoConfig.from_pretrained(folder)
    if config.model_type not in KINDS or not hasattr(config, "patch_size"):
        raise ValueError(
            f"teacher '{name}': '{folder}' holds a model of type '{config.model_type}'; expected "
            "'radio', or 'timm_wrapper' with a patch_size: the folder of a fused encoder or a "
            "C-RADIO release"
        )
    model_class, teacher_class = KINDS[config.model_type]
    if pretrained is None:
        with seeded(seed):
            model = model_class(config)
    else:
        model = model_class.from_pretrained(pretrained)
    return teacher_class(name, model, native_size)


def _check_place(name: str, place: str) -> None:
    if Path(place).is_dir():
        return
    if not HUB_NAME.fullmatch(place):
        raise ValueError(
            f"teacher '{name}': the folder '{place}' does not exist; expected an encoder's folder "
            "(made by `radio fuse RUN FOLDER`) or a hub name (owner/model)"
        )
    require_hub(name, place, f"the model folder '{place}', as there is none here,")
