"""Start the backbone from a timm ViT, by name or from a file of its weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.layers.patch_embed import resample_patch_embed

from student.radio_layout import State
from student.vit import CLIP_MEAN, CLIP_STD, LayerScale, VisionTransformer
from student.weight_files import SUFFIXES, read_file

# Parts of some timm ViTs that compute something which the backbone has no place for.
UNSUPPORTED = ("norm_pre.", ".q_norm.", ".k_norm.", ".w12.", "fc1_g.", ".mlp.norm.", "attn.norm.")


def load_timm(
    backbone: VisionTransformer,
    source: str | Path,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> None:
    """Copy a timm ViT's weights into the backbone, in place; its final norm is dropped.

    `mean`, `std` are the pixels' normalisation that the weights expect; by name it is timm's own,
    for a file CLIP's unless given. It is folded into the patch projection, the projection's bias
    into the position table, and every CLS row starts as timm's CLS token with its position.
    FileNotFoundError or ValueError when the source is missing or of another shape.

    Recipe: start from a timm ViT; PHI-S (2410.01680); student.init;
    tests/test_student.py::test_a_timm_vit_goes_in_exactly.
    """
    state, known_mean, known_std = _read(source)
    load_timm_state(backbone, state, str(source), mean or known_mean, std or known_std)


def load_timm_state(
    backbone: VisionTransformer,
    state: State,
    source: str,
    mean: Sequence[float] = CLIP_MEAN,
    std: Sequence[float] = CLIP_STD,
) -> None:
    """Copy a timm ViT's state dict into the backbone as `load_timm` does; `source` is its name."""
    _check_shape(backbone, state, source)
    _load_patches(backbone, state, mean, std)
    _load_positions(backbone, state, source)
    for index in range(backbone.shape.depth):
        _load_block(backbone, state, index)


def _read(source: str | Path) -> tuple[State, Sequence[float], Sequence[float]]:
    path = Path(source)
    if path.is_file():
        return read_file(path)[0], CLIP_MEAN, CLIP_STD
    if path.suffix in SUFFIXES:
        raise FileNotFoundError(
            f"The weight file {path} does not exist; give an existing one or a timm model's name."
        )
    try:
        model = timm.create_model(str(source), pretrained=True)
    except (OSError, RuntimeError) as error:
        raise ValueError(
            f"timm cannot load {str(source)!r} ({error}); give a name from "
            "timm.list_models('vit*', pretrained=True), or a local weight file."
        ) from error
    config: dict[str, Any] = vars(model)["pretrained_cfg"]
    return dict(model.state_dict()), config["mean"], config["std"]


def _check_shape(backbone: VisionTransformer, state: State, source: str) -> None:
    needed = ("patch_embed.proj.weight", "pos_embed", "blocks.0.attn.qkv.weight")
    missing = [name for name in needed if name not in state]
    if missing:
        raise ValueError(
            f"{source} is no timm ViT with learned positions: it lacks {', '.join(missing)}."
        )
    extra = sorted({part for part in UNSUPPORTED for name in state if part in name})
    if extra:
        raise ValueError(
            f"{source} has {', '.join(part.strip('.') for part in extra)}, which the backbone has "
            "no place for; choose a plain pre-norm ViT."
        )
    depth = 1 + max(int(name.split(".")[1]) for name in state if name.startswith("blocks."))
    found = (state["pos_embed"].shape[-1], depth, state["blocks.0.mlp.fc1.weight"].shape[0])
    shape = backbone.shape
    if found != (shape.width, shape.depth, shape.mlp_hidden):
        raise ValueError(
            f"{source} has width {found[0]}, depth {found[1]}, MLP {found[2]}; the student has "
            f"width {shape.width}, depth {shape.depth}, MLP {shape.mlp_hidden}. "
            "Choose the student size that fits, or another init."
        )


@torch.no_grad()
def _load_patches(
    backbone: VisionTransformer,
    state: State,
    mean: Sequence[float],
    std: Sequence[float],
) -> None:
    """Set the projection, and the position table to the bias alone."""
    patch = backbone.patch_size
    kernel = resample_patch_embed(state["patch_embed.proj.weight"].float(), [patch, patch])
    bias = state.get("patch_embed.proj.bias", kernel.new_zeros(kernel.shape[0])).float()
    # (x - mean) / std = ours * our_std / std + (our_mean - mean) / std
    ours = backbone.input_conditioner
    their_mean, their_std = (torch.tensor(list(v)).view(3, 1, 1) for v in (mean, std))
    our_mean, our_std = ours.norm_mean.float().cpu(), ours.norm_std.float().cpu()
    bias = bias + (kernel * (our_mean - their_mean) / their_std).sum(dim=(1, 2, 3))
    backbone.patch_generator.embedder.weight.copy_((kernel * our_std / their_std).flatten(1))
    backbone.patch_generator.pos_embed.copy_(bias.expand_as(backbone.patch_generator.pos_embed))


@torch.no_grad()
def _load_positions(backbone: VisionTransformer, state: State, source: str) -> None:
    """Add timm's resampled positions to the table; set CLS rows and registers."""
    cls = state.get("cls_token")
    registers = state.get("reg_token")
    num_cls = 0 if cls is None else 1
    num_registers = 0 if registers is None else registers.shape[1]
    positions = state["pos_embed"].float()
    count = positions.shape[1]
    for num_prefix in (0, num_cls, num_cls + num_registers):
        side = math.isqrt(count - num_prefix)
        if side * side == count - num_prefix:
            break
    else:
        raise ValueError(f"{source} has {count} positions, which form no square.")
    prefix, grid = positions[0, :num_prefix], positions[:, num_prefix:]
    table = backbone.patch_generator.pos_embed
    new_side = math.isqrt(table.shape[1])
    image = grid.reshape(1, side, side, -1).permute(0, 3, 1, 2)
    if new_side != side:
        image = F.interpolate(image, size=(new_side, new_side), mode="bicubic", antialias=True)
    table.add_(image.flatten(2).transpose(1, 2).to(table))
    token = backbone.patch_generator.cls_token.token
    if cls is not None:
        row = cls[0, 0].float() + (prefix[0] if num_prefix else 0)
        token[: backbone.num_cls].copy_(row.expand(backbone.num_cls, -1))
    if registers is not None:
        rows = registers[0].float()
        if num_prefix > num_cls:
            rows = rows + prefix[num_cls:]
        rows = rows[: backbone.num_registers]
        token[backbone.num_cls : backbone.num_cls + len(rows)].copy_(rows)


@torch.no_grad()
def _load_block(backbone: VisionTransformer, state: State, index: int) -> None:
    """Set one block; LayerScale stays where the backbone has it and is folded where not."""
    block = backbone.blocks[index]
    start = f"blocks.{index}."
    theirs = {name[len(start) :]: value for name, value in state.items() if name.startswith(start)}
    for scale, linear in (("ls1", "attn.proj"), ("ls2", "mlp.fc2")):
        gamma = theirs.pop(f"{scale}.gamma", None)
        layer = block.get_submodule(scale)
        if isinstance(layer, LayerScale):
            layer.gamma.fill_(1.0) if gamma is None else layer.gamma.copy_(gamma)
        elif gamma is not None:
            theirs[f"{linear}.weight"] = theirs[f"{linear}.weight"] * gamma[:, None]
            if f"{linear}.bias" in theirs:
                theirs[f"{linear}.bias"] = theirs[f"{linear}.bias"] * gamma
    for name, parameter in block.named_parameters():
        if name.endswith(".gamma"):
            continue
        if name not in theirs:
            if not name.endswith(".bias"):
                raise ValueError(f"The timm weights lack {start}{name}.")
            parameter.zero_()
            continue
        if parameter.shape != theirs[name].shape:
            raise ValueError(
                f"{start}{name} is {list(theirs[name].shape)} in the timm weights and "
                f"{list(parameter.shape)} in the student."
            )
        parameter.copy_(theirs[name])
