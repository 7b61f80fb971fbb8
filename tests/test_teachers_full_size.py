"""Full-size teachers on the meta device against the keys and shapes that upstream saves.

The layouts of Meta's own files are written out here from facebookresearch/dinov2 and dinov3
(`models/vision_transformer.py`, `layers/{attention,block,swiglu_ffn}.py`), those of facebook/sam3
and google/siglip2-so400m-patch16-naflex from what transformers' `convert_sam3_video_to_hf.py` and
`convert_siglip2_to_hf.py` write; open_clip's and SAM's are what their builders give.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import open_clip
import pytest
import timm
import torch
import transformers
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
    "name",
    [
        "dfn_clip_h14_378",
        "openai_clip_l14_336",
        "siglip_so400m_14_384",
        "siglip2_gopt_16_384",
        "siglip2_so400m_16_384",
    ],
)
def test_open_clips_visual_tower(name: str) -> None:
    with torch.device("meta"):
        teacher, options = built(name)
        whole = open_clip.create_model(
            options["model"], force_image_size=options.get("image_size"), device="meta"
        )
    published = {k.removeprefix(VISUAL): v for k, v in whole.state_dict().items() if VISUAL in k}
    if "_clip_" in name:
        ours = {k.removeprefix(VISUAL): v for k, v in teacher.state_dict().items()}
    else:
        ours = teacher.state_dict()
    assert shapes(ours) == shapes(published)


@pytest.mark.parametrize("size", ["b", "l", "h"])
def test_sams_encoder_without_its_neck(size: str) -> None:
    with torch.device("meta"):
        teacher, _ = built(f"sam_{size}")
        whole = sam_model_registry[f"vit_{size}"]()
    ours = {key.removeprefix("encoder."): value for key, value in teacher.state_dict().items()}
    assert shapes(ours) == shapes(encoder_state(whole.state_dict()))
    blocks = teacher.get_submodule("encoder.blocks")
    upstream = whole.image_encoder.blocks
    assert [block.window_size for block in blocks] == [block.window_size for block in upstream]
    assert [b.attn.num_heads for b in blocks] == [b.attn.num_heads for b in upstream]


def dinov2(width: int, depth: int) -> State:
    """`dinov2_vit{s,b,l}14_reg4_pretrain.pth`: plain MLP, positions of 518 px and the class's."""
    state = {
        "cls_token": torch.zeros(1, 1, width),
        "register_tokens": torch.zeros(1, 4, width),
        "mask_token": torch.zeros(1, width),
        "pos_embed": torch.zeros(1, 37 * 37 + 1, width),
        "patch_embed.proj.weight": torch.zeros(width, 3, 14, 14),
        "patch_embed.proj.bias": torch.zeros(width),
        **_linears("norm", width),
    }
    for block in range(depth):
        at = f"blocks.{block}."
        state |= _linears(f"{at}norm1", width) | _linears(f"{at}norm2", width)
        state |= _linears(f"{at}attn.qkv", 3 * width, width)
        state |= _linears(f"{at}attn.proj", width, width)
        state |= _linears(f"{at}mlp.fc1", 4 * width, width)
        state |= _linears(f"{at}mlp.fc2", width, 4 * width)
        state |= {f"{at}ls{number}.gamma": torch.zeros(width) for number in (1, 2)}
    return state


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


def dinov3(width: int, depth: int, head: int, swiglu: int | None = None) -> State:
    """`dinov3_vit{b16,l16,h16plus}_pretrain_lvd1689m`: biased qkv, masked where it is k."""
    state = {
        "cls_token": torch.zeros(1, 1, width),
        "storage_tokens": torch.zeros(1, 4, width),
        "mask_token": torch.zeros(1, width),
        "rope_embed.periods": torch.zeros(head // 4),
        "patch_embed.proj.weight": torch.zeros(width, 3, 16, 16),
        "patch_embed.proj.bias": torch.zeros(width),
        **_linears("norm", width),
    }
    for block in range(depth):
        at = f"blocks.{block}."
        state |= _linears(f"{at}norm1", width) | _linears(f"{at}norm2", width)
        state |= _linears(f"{at}attn.qkv", 3 * width, width)
        state |= {f"{at}attn.qkv.bias_mask": torch.zeros(3 * width)}
        state |= _linears(f"{at}attn.proj", width, width)
        if swiglu is None:
            state |= _linears(f"{at}mlp.fc1", 4 * width, width)
            state |= _linears(f"{at}mlp.fc2", width, 4 * width)
        else:
            state |= _linears(f"{at}mlp.w1", swiglu, width) | _linears(f"{at}mlp.w2", swiglu, width)
            state |= _linears(f"{at}mlp.w3", width, swiglu)
        state |= {f"{at}ls{number}.gamma": torch.zeros(width) for number in (1, 2)}
    return state


def sam3() -> State:
    """The trunk in `facebook/sam3`: mlp of 4736, positions of 336 px, no class's, no patch bias."""
    state = {
        "embeddings.position_embeddings": torch.zeros(1, 24 * 24, 1024),
        "embeddings.patch_embeddings.projection.weight": torch.zeros(1024, 3, 14, 14),
        **_linears("layer_norm", 1024),
    }
    for layer in range(32):
        at = f"layers.{layer}."
        state |= _linears(f"{at}layer_norm1", 1024) | _linears(f"{at}layer_norm2", 1024)
        for part in ("q_proj", "k_proj", "v_proj", "o_proj"):
            state |= _linears(f"{at}attention.{part}", 1024, 1024)
        state |= _linears(f"{at}mlp.fc1", 4736, 1024) | _linears(f"{at}mlp.fc2", 1024, 4736)
    return state


def siglip_naflex() -> State:
    """The vision tower in `google/siglip2-so400m-patch16-naflex`, positions of 256 px."""
    state = {
        **_linears("embeddings.patch_embedding", 1152, 3 * 16 * 16),
        "embeddings.position_embedding.weight": torch.zeros(256, 1152),
        "head.probe": torch.zeros(1, 1, 1152),
        "head.attention.in_proj_weight": torch.zeros(3 * 1152, 1152),
        "head.attention.in_proj_bias": torch.zeros(3 * 1152),
        **_linears("head.attention.out_proj", 1152, 1152),
        **_linears("head.layernorm", 1152),
        **_linears("head.mlp.fc1", 4304, 1152),
        **_linears("head.mlp.fc2", 1152, 4304),
        **_linears("post_layernorm", 1152),
    }
    for layer in range(27):
        at = f"encoder.layers.{layer}."
        state |= _linears(f"{at}layer_norm1", 1152) | _linears(f"{at}layer_norm2", 1152)
        for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
            state |= _linears(f"{at}self_attn.{part}", 1152, 1152)
        state |= _linears(f"{at}mlp.fc1", 4304, 1152) | _linears(f"{at}mlp.fc2", 1152, 4304)
    return state


def _linears(name: str, *shape: int) -> State:
    return {f"{name}.weight": torch.zeros(shape), f"{name}.bias": torch.zeros(shape[0])}


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("dinov2_s14_reg", partial(dinov2, 384, 12)),
        ("dinov2_b14_reg", partial(dinov2, 768, 12)),
        ("dinov2_l14_reg", partial(dinov2, 1024, 24)),
        ("dinov2_g14_reg", dinov2_g),
        ("dinov3_b16", partial(dinov3, 768, 12, 64)),
        ("dinov3_l16", partial(dinov3, 1024, 24, 64)),
        ("dinov3_h16plus", partial(dinov3, 1280, 32, 64, swiglu=5120)),
        ("dinov3_7b", dinov3_7b),
    ],
)
def test_metas_own_files(
    name: str, published: Callable[[], State], capsys: pytest.CaptureFixture[str]
) -> None:
    with torch.device("meta"):
        teacher, _ = built(name)
        state = published()
    model = teacher.model
    assert isinstance(model, torch.nn.Module)
    convert = sys.modules[type(model).__module__].checkpoint_filter_fn
    load_strictly(name, model, convert(state, model), "Meta's file")  # raises what does not fit
    assert capsys.readouterr().out == ""  # timm prints when it drops the biases of qkv


def test_sam3s_trunk() -> None:
    with torch.device("meta"):
        teacher, _ = built("sam3")
        published = sam3()
        whole = transformers.Sam3Model(transformers.Sam3Config())
    trunk = teacher.get_submodule("trunk")
    assert shapes(trunk.state_dict()) == shapes(published)
    upstream = whole.vision_encoder.backbone
    assert shapes(trunk.state_dict()) == shapes(upstream.state_dict())
    # What the shapes do not tell.
    ours, stock = trunk.config.to_dict(), upstream.config.to_dict()
    assert {key for key in stock if ours[key] != stock[key]} <= {"initializer_range"}


def test_siglip_naflex_tower() -> None:
    with torch.device("meta"):
        teacher, _ = built("siglip2_so400m_16_naflex")
        published = siglip_naflex()
        judge = timm.create_model("naflexvit_so400m_patch16_siglip", num_classes=0)
    model = teacher.get_submodule("model")
    assert shapes(model.state_dict()) == shapes(published)
    # timm's own NaFlex of the same size; its positions too are of 16 x 16.
    assert judge.blocks[0].attn.num_heads == model.config.num_attention_heads
    assert sum(w.numel() for w in judge.parameters()) == sum(w.numel() for w in model.parameters())
