"""Start the backbone from weights that are there: an encoder's, NVIDIA's, or a timm ViT's."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from student.positions import eval_positions
from student.radio_layout import HUB, MODEL, State, below, from_disk, from_hub, materialise_spectral
from student.timm_backbone import load_timm, load_timm_state
from student.vit import LayerScale, VisionTransformer
from student.weight_files import read_file, read_safetensors


def warm_start(backbone: VisionTransformer, source: str | Path) -> None:
    """Copy weights into the backbone, in place; the adaptors stay as they are.

    `source` is an encoder folder (of `radio fuse`, of transformers' RadioModel, or NVIDIA's), one
    weight file of such a folder, NVIDIA's `.pth.tar`, or a timm ViT's name or weight file. An
    encoder's heads are not taken: they say the teachers' own spaces, while adaptors in training
    say standardized ones, which are fitted later. NVIDIA's files before v3 resize positions with
    aligned corners; the student does not, so it starts a little beside them.
    FileNotFoundError or ValueError when nothing of that kind is there, or one of another shape.

    Recipe: start from an encoder; ours; student.init;
    tests/test_warm_start.py::test_an_encoder_folder_starts_the_same_features.
    """
    path = Path(source)
    if not path.exists():
        load_timm(backbone, source)
        return
    tensors, args = read_folder(path) if path.is_dir() else read_file(path)
    if below(tensors, MODEL):
        load_radio(backbone, from_disk(materialise_spectral(tensors)), str(path), args)
    elif below(tensors, HUB):
        load_radio(backbone, from_hub(tensors, args), str(path), {})
    elif path.is_dir():
        raise ValueError(
            f"{path} holds no RADIO backbone ('{MODEL}*'); expected an encoder folder. A run or a "
            "checkpoint becomes one by `radio fuse`."
        )
    else:
        load_timm_state(backbone, tensors, str(path))


def read_folder(path: Path) -> tuple[State, dict[str, Any]]:
    """Return the tensors of an encoder folder's `model*.safetensors` and its config.json."""
    config, files = path / "config.json", sorted(path.glob("model*.safetensors"))
    if not config.is_file() or not files:
        found = ", ".join(sorted(item.name for item in path.iterdir())[:8]) or "nothing"
        raise ValueError(
            f"{path} is no encoder folder: expected config.json and model.safetensors (from "
            f"`radio fuse RUN FOLDER`, or NVIDIA's), found {found}."
        )
    tensors = {key: value for file in files for key, value in read_safetensors(file).items()}
    try:
        return tensors, dict(json.loads(config.read_text()))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{config} holds no settings by name ({error}).") from error


@torch.no_grad()
def load_radio(
    backbone: VisionTransformer, state: State, source: str, config: dict[str, Any]
) -> None:
    """Copy a RADIO backbone's state dict, LayerScale folded, into ours.

    The position table is resized as eval_positions does, so that pictures of the student's own
    table size are encoded as by the source. CLS rows and registers are copied row by row, whoever
    they belonged to: attention does not care which is which, so with as many rows in all the
    features stay. Rows beyond the source's start as the mean of its rows, LayerScale as 1.
    """
    ours = {**dict(backbone.named_parameters()), **dict(backbone.named_buffers())}
    scales = {f"{name}.gamma" for name, m in backbone.named_modules() if isinstance(m, LayerScale)}
    _check_shape(backbone, state, source, config)
    missing = sorted(set(ours) - set(state) - scales)
    if missing:
        raise ValueError(f"{source} is not whole: it lacks {missing[0]} ({len(missing)} keys).")
    for name, tensor in ours.items():
        if name in scales:
            tensor.fill_(1.0)
        elif name == "patch_generator.pos_embed":
            side = math.isqrt(tensor.shape[1])
            tensor.copy_(eval_positions(state[name], side, side))
        elif name == "patch_generator.cls_token.token":
            tensor.copy_(_rows(state[name], len(tensor)))
        else:
            tensor.copy_(state[name])


def _rows(token: Tensor, count: int) -> Tensor:
    missing = max(0, count - len(token))
    return torch.cat([token[:count], token.mean(dim=0).expand(missing, -1)])


def _check_shape(
    backbone: VisionTransformer, state: State, source: str, config: dict[str, Any]
) -> None:
    """Refuse another ViT, naming both; only a folder's config.json says the attention heads."""
    shape = backbone.shape
    needed = ("patch_generator.embedder.weight", "blocks.0.mlp.fc1.weight")
    missing = [key for key in needed if key not in state]
    if missing:
        raise ValueError(f"{source} is not whole: it lacks {', '.join(missing)}.")
    width, pixels = state[needed[0]].shape
    found = {
        "patch": math.isqrt(pixels // 3),
        "width": width,
        "depth": 1 + max(int(key.split(".")[1]) for key in state if key.startswith("blocks.")),
        "MLP": len(state[needed[1]]),
        "heads": config.get("num_attention_heads", shape.heads),
    }
    ours = {
        "patch": backbone.patch_size,
        "width": shape.width,
        "depth": shape.depth,
        "MLP": shape.mlp_hidden,
        "heads": shape.heads,
    }
    if found != ours:
        theirs, own = (
            ", ".join(f"{name} {value}" for name, value in facts.items()) for facts in (found, ours)
        )
        raise ValueError(
            f"{source} has {theirs}; the student has {own}. Choose the student.size and "
            "student.patch_size that fit, or another init."
        )
