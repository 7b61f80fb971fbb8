"""Full-size teachers on the meta device against the keys and shapes that upstream saves.

The layouts of Meta's own files are written out here from facebookresearch/dinov2 and dinov3
(`models/vision_transformer.py`, `layers/{attention,block,swiglu_ffn}.py`); open_clip's and SAM's
are what their builders give.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
import yaml
from segment_anything import sam_model_registry
from torch import Tensor

from teachers import Teacher, build_teacher
from teachers.open_clip_tower import VISUAL
from teachers.sam import encoder_state
from teachers.weights import load_strictly

CONFIGS = Path(__file__).parents[1] / "configs" / "teacher"
State = dict[str, Tensor]


def built(name: str) -> tuple[Teacher, dict[str, Any]]:
    config = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
    return build_teacher(config["kind"], name, config["options"], None, 0), config["options"]


def shapes(state: State) -> dict[str, tuple[int, ...]]:
    return {key: tuple(value.shape) for key, value in state.items()}


@pytest.mark.parametrize(
    "name", ["dfn_clip_h14_378", "siglip_so400m_14_384", "siglip2_gopt_16_384"]
)
def test_open_clips_visual_tower(name: str) -> None:
    with torch.device("meta"):
        teacher, options = built(name)
        whole = open_clip.create_model(
            options["model"], force_image_size=options.get("image_size"), device="meta"
        )
    published = {k.removeprefix(VISUAL): v for k, v in whole.state_dict().items() if VISUAL in k}
    if name.startswith("dfn"):
        ours = {k.removeprefix(VISUAL): v for k, v in teacher.state_dict().items()}
    else:
        ours = teacher.state_dict()
    assert shapes(ours) == shapes(published)


def test_sams_encoder_without_its_neck() -> None:
    with torch.device("meta"):
        teacher, _ = built("sam_h")
        whole = sam_model_registry["vit_h"]()
    ours = {key.removeprefix("encoder."): value for key, value in teacher.state_dict().items()}
    assert shapes(ours) == shapes(encoder_state(whole.state_dict()))


def dinov2_g() -> State:
    """`dinov2_vitg14_reg4_pretrain.pth`: SwiGLU of 4096, positions of 518 px with the class's."""
    state = {
        "cls_token": torch.zeros(1, 1, 1536),
        "register_tokens": torch.zeros(1, 4, 1536),
        "mask_token": torch.zeros(1, 1536),
        "pos_embed": torch.zeros(1, 37 * 37 + 1, 1536),
        "patch_embed.proj.weight": torch.zeros(1536, 3, 14, 14),
        "patch_embed.proj.bias": torch.zeros(1536),
        **_linears("norm", 1536),
    }
    for block in range(40):
        at = f"blocks.{block}."
        state |= _linears(f"{at}norm1", 1536) | _linears(f"{at}norm2", 1536)
        state |= _linears(f"{at}attn.qkv", 4608, 1536) | _linears(f"{at}attn.proj", 1536, 1536)
        state |= _linears(f"{at}mlp.w12", 8192, 1536) | _linears(f"{at}mlp.w3", 1536, 4096)
        state |= {f"{at}ls{number}.gamma": torch.zeros(1536) for number in (1, 2)}
    return state


def dinov3_7b() -> State:
    """`dinov3_vit7b16_pretrain_lvd1689m`: SwiGLU of 8192, no bias in qkv, rotary positions."""
    state = {
        "cls_token": torch.zeros(1, 1, 4096),
        "storage_tokens": torch.zeros(1, 4, 4096),
        "mask_token": torch.zeros(1, 4096),
        "rope_embed.periods": torch.zeros(32),
        "patch_embed.proj.weight": torch.zeros(4096, 3, 16, 16),
        "patch_embed.proj.bias": torch.zeros(4096),
        **_linears("norm", 4096),
        **_linears("local_cls_norm", 4096),
    }
    for block in range(40):
        at = f"blocks.{block}."
        state |= _linears(f"{at}norm1", 4096) | _linears(f"{at}norm2", 4096)
        state |= {f"{at}attn.qkv.weight": torch.zeros(12288, 4096)}
        state |= _linears(f"{at}attn.proj", 4096, 4096)
        state |= _linears(f"{at}mlp.w1", 8192, 4096) | _linears(f"{at}mlp.w2", 8192, 4096)
        state |= _linears(f"{at}mlp.w3", 4096, 8192)
        state |= {f"{at}ls{number}.gamma": torch.zeros(4096) for number in (1, 2)}
    return state


def _linears(name: str, *shape: int) -> State:
    return {f"{name}.weight": torch.zeros(shape), f"{name}.bias": torch.zeros(shape[0])}


@pytest.mark.parametrize(
    ("name", "published"), [("dinov2_g14_reg", dinov2_g), ("dinov3_7b", dinov3_7b)]
)
def test_metas_own_files(name: str, published: Callable[[], State]) -> None:
    with torch.device("meta"):
        teacher, _ = built(name)
        state = published()
    model = teacher.model
    assert isinstance(model, torch.nn.Module)
    convert = sys.modules[type(model).__module__].checkpoint_filter_fn
    load_strictly(name, model, convert(state, model), "Meta's file")  # raises what does not fit
