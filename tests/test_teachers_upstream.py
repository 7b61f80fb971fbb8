"""Teachers against the upstream libraries, on state dicts saved in the upstream layouts."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import open_clip
import pytest
import timm
import torch
import yaml
from safetensors.torch import save_file
from segment_anything.modeling import ImageEncoderViT
from torch import Tensor, nn

from teachers import Teacher, build_teacher
from teachers.base import redraw_constants
from teachers.open_clip_tower import register_models
from teachers.weights import load_state

CONFIGS = Path(__file__).parents[1] / "configs" / "teacher"


def options_of(name: str) -> dict[str, Any]:
    return yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())["options"]


def loaded(kind: str, path: Path) -> Teacher:
    return build_teacher(kind, kind, options_of(f"demo_{kind}"), str(path), 99)


def shaken(module: nn.Module) -> nn.Module:
    """Give every weight a value of its own, norms and biases too."""
    redraw_constants(module, 1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for weight in module.parameters():
            weight.add_(torch.randn(weight.shape, generator=generator), alpha=0.02)
    return module.eval().requires_grad_(False)


def pixels(side: int) -> Tensor:
    return torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(3))


def as_tokens(features: Tensor) -> Tensor:
    return features.flatten(2).transpose(1, 2)


@torch.no_grad()
def test_clip_is_open_clip(tmp_path: Path):
    register_models()
    whole = shaken(open_clip.create_model("demo-clip"))
    torch.save({"state_dict": whole.state_dict()}, tmp_path / "clip.pt")
    output = loaded("clip", tmp_path / "clip.pt")(pixels(128))
    assert torch.equal(output.summary, whole.encode_image(pixels(128)))
    whole.visual.output_tokens = True
    assert torch.equal(as_tokens(output.features), whole.visual(pixels(128))[1])


@torch.no_grad()
def test_clip_features_are_before_the_projection_and_after_the_norm(tmp_path: Path):
    register_models()
    whole = shaken(open_clip.create_model("demo-clip"))
    save_file(whole.state_dict(), tmp_path / "clip.safetensors")
    visual = whole.visual
    normed: list[Tensor] = []
    visual.ln_post.register_forward_hook(lambda _m, _i, out: normed.append(out))
    visual(pixels(128))
    output = loaded("clip", tmp_path / "clip.safetensors")(pixels(128))
    assert torch.equal(as_tokens(output.features), normed[0][:, 1:])
    assert torch.equal(output.summary, normed[0][:, 0] @ visual.proj)


@torch.no_grad()
def test_siglip_is_open_clip(tmp_path: Path):
    register_models()
    whole = shaken(open_clip.create_model("demo-map", force_image_size=128))
    save_file(whole.state_dict(), tmp_path / "siglip.safetensors")
    output = loaded("siglip", tmp_path / "siglip.safetensors")(pixels(128))
    assert torch.equal(output.summary, whole.encode_image(pixels(128)))
    tokens = whole.visual.trunk.forward_features(pixels(128))
    assert torch.equal(as_tokens(output.features), tokens[:, 1:])


def dinov2() -> nn.Module:
    options = {key: v for key, v in options_of("demo_dinov2").items() if key != "native_size"}
    return shaken(timm.create_model(**{"model_name": options.pop("model")} | options))


def in_meta_layout(vit: nn.Module) -> dict[str, Tensor]:
    """Return a timm DINOv2 as Meta saves it: a position and a mask token that timm leaves out."""
    state = {key: value.clone() for key, value in vit.state_dict().items()}
    state["register_tokens"] = state.pop("reg_token")
    class_position = torch.full((1, 1, 192), 0.25)
    state["cls_token"] = state["cls_token"] - class_position
    state["pos_embed"] = torch.cat([class_position, state["pos_embed"]], dim=1)
    state["mask_token"] = torch.zeros(1, 192)
    return state


@torch.no_grad()
@pytest.mark.parametrize("side", [224, 112])
def test_dinov2_is_timm(tmp_path: Path, side: int):
    vit = dinov2()
    torch.save(vit.state_dict(), tmp_path / "timm.pth")
    output = loaded("dinov2", tmp_path / "timm.pth")(pixels(side))
    if side == 112:  # upstream needs dynamic positions for another size
        options = options_of("demo_dinov2")
        del options["native_size"]
        moving = timm.create_model(
            options.pop("model"), num_classes=0, dynamic_img_size=True, **options
        )
        moving.load_state_dict(vit.state_dict())
        vit = moving.eval()
    tokens = vit.forward_features(pixels(side))
    assert torch.equal(output.summary, tokens[:, 0])
    assert torch.equal(as_tokens(output.features), tokens[:, 5:])


@torch.no_grad()
def test_dinov2_reads_meta_s_layout(tmp_path: Path):
    vit = dinov2()
    torch.save(in_meta_layout(vit), tmp_path / "meta.pth")
    output = loaded("dinov2", tmp_path / "meta.pth")(pixels(224))
    tokens = vit.forward_features(pixels(224))
    torch.testing.assert_close(output.summary, tokens[:, 0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(as_tokens(output.features), tokens[:, 5:], rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_dinov3_goes_through_the_same_module(tmp_path: Path):
    small = {"embed_dim": 96, "depth": 2, "num_heads": 3, "img_size": 64}
    name = "vit_small_patch16_dinov3"
    vit = shaken(timm.create_model(name, num_classes=0, dynamic_img_size=True, **small))
    save_file(vit.state_dict(), tmp_path / "vit.safetensors")
    options = {"model": name, "native_size": 64} | small
    teacher = build_teacher("dinov2", "v3", options, str(tmp_path / "vit.safetensors"), 0)
    for side in (64, 96):
        tokens = vit.forward_features(pixels(side))
        output = teacher(pixels(side))
        assert torch.equal(output.summary, tokens[:, 0])
        assert torch.equal(as_tokens(output.features), tokens[:, 5:])


@torch.no_grad()
def test_dinov3_reads_meta_s_layout_with_the_biases_of_q_and_v(tmp_path: Path):
    small = {"embed_dim": 96, "depth": 2, "num_heads": 3, "img_size": 64}
    name = "vit_base_patch16_dinov3_qkvb"
    vit = shaken(timm.create_model(name, num_classes=0, dynamic_img_size=True, **small))
    state = {"mask_token": torch.zeros(1, 96), "rope_embed.periods": torch.zeros(8)}
    for key, value in vit.state_dict().items():
        renamed = key.replace("reg_token", "storage_tokens")
        for number in (1, 2):
            renamed = renamed.replace(f"gamma_{number}", f"ls{number}.gamma")
        state[renamed] = value
    for block in range(2):
        at = f"blocks.{block}.attn."
        q, v = (state.pop(f"{at}{part}_bias") for part in "qv")
        state[f"{at}qkv.bias"] = torch.cat([q, torch.zeros(96), v])
        state[f"{at}qkv.bias_mask"] = torch.ones(3 * 96)
    torch.save(state, tmp_path / "meta.pth")
    options = {"model": name, "native_size": 64} | small
    output = build_teacher("dinov2", "v3", options, str(tmp_path / "meta.pth"), 0)(pixels(64))
    tokens = vit.forward_features(pixels(64))
    assert torch.equal(output.summary, tokens[:, 0])
    assert torch.equal(as_tokens(output.features), tokens[:, 5:])


def sam_encoder() -> nn.Module:
    """Build the encoder as segment_anything's own `build_sam` does, in small."""
    return shaken(
        ImageEncoderViT(
            depth=4,
            embed_dim=192,
            img_size=256,
            mlp_ratio=4,
            norm_layer=partial(nn.LayerNorm, eps=1e-6),
            num_heads=3,
            patch_size=16,
            qkv_bias=True,
            use_rel_pos=True,
            global_attn_indexes=(1, 3),
            window_size=8,
            out_chans=256,
        )
    )


def full_sam(encoder: nn.Module) -> dict[str, Tensor]:
    state = {f"image_encoder.{key}": value for key, value in encoder.state_dict().items()}
    extra = {"prompt_encoder.no_mask_embed.weight": 1, "mask_decoder.iou_token.weight": 1}
    return state | {key: torch.zeros(size) for key, size in extra.items()}


@torch.no_grad()
def test_sam_is_segment_anything_before_its_neck(tmp_path: Path):
    encoder = sam_encoder()
    torch.save(full_sam(encoder), tmp_path / "sam.pth")
    before_neck: list[Tensor] = []
    encoder.neck.register_forward_pre_hook(lambda _m, inputs: before_neck.append(inputs[0]))
    encoder(pixels(256))
    output = loaded("sam", tmp_path / "sam.pth")(pixels(256))
    assert output.summary is None
    assert torch.equal(output.features, before_neck[0])


def test_sam_names_what_is_missing(tmp_path: Path):
    state = full_sam(sam_encoder())
    del state["image_encoder.blocks.0.attn.rel_pos_h"]
    torch.save(state, tmp_path / "sam.pth")
    with pytest.raises(ValueError, match=r"missing: blocks\.0\.attn\.rel_pos_h"):
        loaded("sam", tmp_path / "sam.pth")


def test_a_checkpoint_of_another_shape_is_refused(tmp_path: Path):
    register_models()
    wide = open_clip.create_model("demo-clip", force_image_size=160)
    torch.save(wide.state_dict(), tmp_path / "wide.pt")
    with pytest.raises(ValueError, match=r"wrong shapes: positional_embedding \(101, 192\)"):
        loaded("clip", tmp_path / "wide.pt")


@pytest.mark.parametrize("name", ["damaged.safetensors", "damaged.pth"])
def test_damaged_files_are_refused(tmp_path: Path, name: str):
    (tmp_path / name).write_bytes(b"not a checkpoint at all")
    with pytest.raises(ValueError, match="cannot be read"):
        load_state(tmp_path / name)


class Payload:
    """What a hostile checkpoint would hold: an object that unpickling would have to call."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (print, ("unpickled",))


def test_pickled_code_never_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    torch.save({"weight": Payload()}, tmp_path / "code.pth")
    with pytest.raises(ValueError, match="cannot be read"):
        load_state(tmp_path / "code.pth")
    assert capsys.readouterr().out == ""


def test_files_without_tensors_and_missing_files_are_refused(tmp_path: Path):
    torch.save({"epoch": 3}, tmp_path / "empty.pth")
    with pytest.raises(ValueError, match="holds no tensors"):
        load_state(tmp_path / "empty.pth")
    with pytest.raises(ValueError, match=r"nowhere\.pth' does not exist"):
        loaded("sam", tmp_path / "nowhere.pth")


@torch.no_grad()
def test_an_encoder_folder_is_a_teacher(tmp_path: Path):
    import transformers

    config = transformers.RadioConfig(
        hidden_size=48,
        num_hidden_layers=2,
        num_attention_heads=3,
        image_size=64,
        max_img_size=128,
        num_cls_tokens=3,
        num_registers=5,
        summary_idxs=[0, 2],
    )
    model = shaken(transformers.RadioModel(config))
    model.save_pretrained(tmp_path)
    options = {"folder": str(tmp_path), "native_size": 64}
    teacher = build_teacher("encoder", "radio", options, str(tmp_path), 0)
    assert (teacher.mean, teacher.std) == ((0.0,) * 3, (1.0,) * 3)
    assert (teacher.summary_dim, teacher.feature_dim, teacher.stride) == (96, 48, 16)
    for side in (64, 96):
        images = pixels(side).sigmoid()
        judge, output = model(images), teacher(images)
        assert torch.equal(output.summary, judge.summary)
        assert torch.equal(as_tokens(output.features), judge.features)
