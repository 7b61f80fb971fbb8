"""Teachers that run in transformers, against its whole models saved by `save_pretrained`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from test_teachers import TINY
from test_teachers_upstream import as_tokens, shaken
from torch import Tensor
from transformers.models.siglip2.image_processing_siglip2 import Siglip2ImageProcessor

from teachers import Teacher, build_teacher
from teachers.siglip_naflex import patchify

NAFLEX_SIZES = [(64, 64), (96, 96), (96, 160), (48, 32)]


@pytest.fixture(autouse=True)
def _one_thread(_two_threads: None) -> None:
    torch.set_num_threads(1)


def pixels(height: int, width: int) -> Tensor:
    """Pictures in [0, 1], as decoded."""
    return torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(3))


def normalised(images: Tensor) -> Tensor:
    return (images - 0.5) / 0.5


def loaded(name: str, pretrained: Path | str, **overrides: Any) -> Teacher:
    options = TINY[name]["options"] | overrides
    return build_teacher(TINY[name]["kind"], name, options, str(pretrained), 99)


def test_the_zoo_itself_imports_no_transformers():
    said = "import sys, teachers; teachers.kinds(); sys.exit('transformers' in sys.modules)"
    root = Path(__file__).parents[1]
    assert subprocess.run([sys.executable, "-c", said], cwd=root, check=False).returncode == 0


# SAM3


def sam3_config(image_size: int = 112) -> transformers.Sam3Config:
    small = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 16}
    grid = image_size // 14
    trunk = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "image_size": image_size,
        "window_size": 4,
        "global_attn_indexes": [1, 3],
        "pretrain_image_size": 42,
    }
    return transformers.Sam3Config(
        vision_config={
            "backbone_config": {"model_type": "sam3_vit_model"} | trunk,
            "fpn_hidden_size": 16,
            "backbone_feature_sizes": [[4 * grid] * 2, [2 * grid] * 2, [grid] * 2],
        },
        text_config=small | {"num_hidden_layers": 1, "vocab_size": 32, "projection_dim": 16},
        geometry_encoder_config=small | {"num_layers": 1},
        detr_encoder_config=small | {"num_layers": 1},
        detr_decoder_config=small | {"num_layers": 1, "num_queries": 4},
        mask_decoder_config={"hidden_size": 16, "num_attention_heads": 2},
    )


def sam3(image_size: int = 112) -> transformers.Sam3Model:
    torch.manual_seed(0)
    model = shaken(transformers.Sam3Model(sam3_config(image_size)))
    assert isinstance(model, transformers.Sam3Model)
    return model


def as_facebook_saves(folder: Path) -> None:
    """Rename a saved Sam3Model to the layout of facebook/sam3, which a Sam3VideoModel saved."""
    file = folder / "model.safetensors"
    state = {f"detector_model.{key}": value for key, value in load_file(file).items()}
    tracker = {"tracker_model.no_memory_embedding": torch.zeros(1, 1, 16)}
    save_file(state | tracker | {"tracker_neck.fpn_layers.0.proj1.bias": torch.zeros(16)}, file)


@torch.no_grad()
@pytest.mark.parametrize("layout", ["image", "video", "file", "shards", "trunk"])
def test_sam3_is_transformers_before_its_neck(tmp_path: Path, layout: str):
    whole = sam3()
    saved = whole.vision_encoder.backbone if layout == "trunk" else whole
    saved.save_pretrained(tmp_path, max_shard_size="100KB" if layout == "shards" else "1GB")
    if layout == "video":
        as_facebook_saves(tmp_path)
    assert (tmp_path / "model.safetensors.index.json").exists() == (layout == "shards")
    teacher = loaded("tiny_sam3", tmp_path / "model.safetensors" if layout == "file" else tmp_path)
    before_neck: list[Tensor] = []
    neck = whole.vision_encoder.neck
    neck.register_forward_pre_hook(lambda _m, inputs: before_neck.append(inputs[0]))
    images = normalised(pixels(112, 112))
    judge = whole.vision_encoder(images)
    output = teacher(images)
    assert output.summary is None
    assert torch.equal(as_tokens(output.features), judge.last_hidden_state)
    assert torch.equal(output.features, before_neck[0])


def test_the_video_layout_is_what_transformers_itself_names():
    config = transformers.Sam3VideoConfig(detector_config=sam3_config())
    with torch.device("meta"):
        state = transformers.Sam3VideoModel(config).state_dict()
        trunk = sam3().vision_encoder.backbone.state_dict()
    at = "detector_model.vision_encoder.backbone."
    found = {key.removeprefix(at): value for key, value in state.items() if key.startswith(at)}
    assert {k: v.shape for k, v in found.items()} == {k: v.shape for k, v in trunk.items()}
    assert not [key for key in state if "vision_encoder.backbone." in key and at not in key]


@torch.no_grad()
@pytest.mark.parametrize("side", [56, 126, 140])
def test_sam3_reads_the_same_file_at_another_size(tmp_path: Path, side: int):
    """Windows of 4 tile 56 px exactly; 126 and 140 px need padding, and cut the tiled positions."""
    sam3().save_pretrained(tmp_path)
    teacher = loaded("tiny_sam3", tmp_path, image_size=side)
    assert teacher.native_size == side
    images = normalised(pixels(side, side))
    judge = sam3(side).vision_encoder(images).last_hidden_state
    output = teacher(images)
    assert output.features.shape == (2, 64, side // 14, side // 14)
    assert torch.equal(as_tokens(output.features), judge)


def test_sam3_takes_its_native_size_only():
    teacher = build_teacher("sam3", "sam3", TINY["tiny_sam3"]["options"], None, 0)
    with pytest.raises(ValueError, match="native 112 x 112"):
        teacher(torch.zeros(1, 3, 56, 56))


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ({"image_size": 1152}, "1152 is no multiple of its patch_size 14; the nearest are 1148"),
        ({"heads": 3}, r"width 64 must be a multiple of 4 x heads \(3\)"),
        ({"windows": 4}, "'windows'"),
    ],
)
def test_sam3_names_options_that_do_not_fit(overrides: dict[str, Any], said: str):
    options = TINY["tiny_sam3"]["options"] | overrides
    with pytest.raises(ValueError, match=said):
        build_teacher("sam3", "sam3", options, None, 0)


# SigLIP2 NaFlex


def siglip2() -> transformers.Siglip2Model:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 2}
    config = transformers.Siglip2Config(
        vision_config=sizes | {"num_patches": 16}, text_config=sizes | {"vocab_size": 32}
    )
    model = shaken(transformers.Siglip2Model(config))
    assert isinstance(model, transformers.Siglip2Model)
    return model


def processed(images: Tensor, patches: int) -> dict[str, Tensor]:
    """Return what upstream's processor makes of decoded pictures, at their own size."""
    processor = Siglip2ImageProcessor(do_resize=False, do_rescale=False, max_num_patches=patches)
    return dict(processor(list(images), return_tensors="pt"))


@torch.no_grad()
@pytest.mark.parametrize("size", NAFLEX_SIZES)
@pytest.mark.parametrize("layout", ["folder", "file", "tower"])
def test_naflex_is_transformers(tmp_path: Path, size: tuple[int, int], layout: str):
    whole = siglip2()
    (whole.vision_model if layout == "tower" else whole).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    teacher = loaded("tiny_siglip_naflex", file if layout == "file" else tmp_path)
    height, width = size
    images = pixels(height, width)
    inputs = processed(images, height * width // 256)
    assert torch.equal(patchify(normalised(images), 16), inputs["pixel_values"])
    assert inputs["spatial_shapes"].tolist() == [[height // 16, width // 16]] * 2
    judge = whole.get_image_features(**inputs)
    output = teacher(normalised(images))
    assert torch.equal(output.summary, judge.pooler_output)
    assert output.features.shape == (2, 64, height // 16, width // 16)
    assert torch.equal(as_tokens(output.features), judge.last_hidden_state)


@torch.no_grad()
def test_naflex_without_padding_is_naflex_with_it(tmp_path: Path):
    whole = siglip2()
    whole.save_pretrained(tmp_path)
    images = pixels(64, 96)
    judge = whole.get_image_features(**processed(images, 40))
    output = loaded("tiny_siglip_naflex", tmp_path)(normalised(images))
    torch.testing.assert_close(output.summary, judge.pooler_output, rtol=1e-5, atol=1e-5)
    tokens = judge.last_hidden_state[:, :24]
    torch.testing.assert_close(as_tokens(output.features), tokens, rtol=1e-5, atol=1e-5)


def test_patches_are_rows_of_pixels_with_channels_last():
    images = torch.arange(2 * 3 * 4 * 6).reshape(2, 3, 4, 6).float()
    patches = patchify(images, 2)
    assert patches.shape == (2, 6, 12)
    # Patch 4 is the second row's middle: pixels (2, 2), (2, 3), (3, 2), (3, 3), each with RGB.
    corners = [images[1, :, y, x] for y in (2, 3) for x in (2, 3)]
    assert torch.equal(patches[1, 4], torch.cat(corners))


@pytest.mark.parametrize(
    ("overrides", "said"),
    [({"heads": 3}, r"heads \(3\) must divide the width 64"), ({"patches": 256}, "'patches'")],
)
def test_naflex_names_options_that_do_not_fit(overrides: dict[str, Any], said: str):
    options = TINY["tiny_siglip_naflex"]["options"] | overrides
    with pytest.raises(ValueError, match=said):
        build_teacher("siglip_naflex", "naflex", options, None, 0)


# Checkpoints that do not fit


# Model, its trunk's prefix, a key, and options of another shape with what is said of it.
CASES = {
    "tiny_sam3": (
        sam3,
        "vision_encoder.backbone.",
        "layers.2.mlp.fc1.bias",
        (
            {"position_size": 56},
            r"embeddings\.position_embeddings \(1, 9, 64\) instead of \(1, 16, 64\)",
        ),
    ),
    "tiny_siglip_naflex": (
        siglip2,
        "vision_model.",
        "head.probe",
        (
            {"position_grid": 5},
            r"embeddings\.position_embedding\.weight \(16, 64\) instead of \(25, 64\)",
        ),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_missing_and_unexpected_weights_are_named(tmp_path: Path, name: str):
    model, at, key, _ = CASES[name]
    model().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    state = load_file(file)
    value = state.pop(at + key)
    save_file(state, file)
    with pytest.raises(ValueError, match=f"missing: {key}"):
        loaded(name, tmp_path)
    save_file(state | {at + key: value, f"{at}extra": value.clone()}, file)
    with pytest.raises(ValueError, match="unexpected: extra"):
        loaded(name, tmp_path)


@pytest.mark.parametrize("name", CASES)
def test_wrong_shapes_are_named(tmp_path: Path, name: str):
    model, _, _, (overrides, said) = CASES[name]
    model().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"wrong shapes: {said}"):
        loaded(name, tmp_path, **overrides)


@pytest.mark.parametrize("name", CASES)
def test_another_kind_s_checkpoint_is_refused(tmp_path: Path, name: str):
    other = next(case for key, case in CASES.items() if key != name)
    other[0]().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is of another model"):
        loaded(name, tmp_path)


@pytest.mark.parametrize("name", CASES)
def test_damaged_and_missing_files_are_refused(tmp_path: Path, name: str):
    with pytest.raises(ValueError, match=r"cannot be had .* expected model\.safetensors"):
        loaded(name, tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"not a checkpoint at all")
    with pytest.raises(ValueError, match=r"model\.safetensors' cannot be read"):
        loaded(name, tmp_path)
    with pytest.raises(ValueError, match=r"nowhere\.safetensors' does not exist"):
        loaded(name, tmp_path / "nowhere.safetensors")
    with pytest.raises(ValueError, match=r"no weights '.*nowhere'; tags: \w"):
        loaded(name, tmp_path / "nowhere")


def test_a_missing_shard_is_refused(tmp_path: Path):
    sam3().save_pretrained(tmp_path, max_shard_size="100KB")
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 2
    shards[1].unlink()
    with pytest.raises(ValueError, match=rf"{shards[1].name}.*with all its shards"):
        loaded("tiny_sam3", tmp_path)


@pytest.mark.parametrize("name", CASES)
def test_another_hub_name_must_be_downloaded_too(name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ValueError, match=r"'someone/else' must be downloaded.*local file's path"):
        loaded(name, "someone/else")
