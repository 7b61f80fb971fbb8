"""An encoder of the RADIO family as a teacher, read by transformers from its own folder."""

from __future__ import annotations

from pathlib import Path

import transformers
from jaxtyping import Float
from torch import Tensor, nn

from teachers.base import Teacher, TeacherOutput, seeded, to_map
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


def build(
    name: str, pretrained: str | None, seed: int, *, folder: str, native_size: int
) -> EncoderTeacher:
    """Read `config.json` of a folder or hub name and, unless seeded, its weights.

    `pretrained` is null for seeded weights, or a folder or hub name whose weights are read.
    """
    for place in (folder, pretrained):
        if place is not None and not Path(place).is_dir():
            require_hub(name, place, f"the model folder '{place}'")
    config = transformers.AutoConfig.from_pretrained(folder)
    if config.model_type != "radio":
        raise ValueError(
            f"teacher '{name}': '{folder}' holds a model of type '{config.model_type}'; "
            "expected 'radio', the folder of a fused encoder or a C-RADIO release"
        )
    if pretrained is None:
        with seeded(seed):
            return EncoderTeacher(name, transformers.RadioModel(config), native_size)
    model = transformers.RadioModel.from_pretrained(pretrained)
    assert isinstance(model, transformers.RadioModel)
    return EncoderTeacher(name, model, native_size)
