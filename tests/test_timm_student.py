"""Any timm model as the backbone: judged by timm itself and by transformers' AutoModel."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from test_student import DIMS, rms_error, shaken
from torch import nn
from transformers import AutoImageProcessor, AutoModel

from student import timm_trunk
from student.model import Student, build_student
from student.radio_layout import materialise_spectral
from student.timm_trunk import TimmTrunk, load_trunk, timm_config, timm_state

# One of each family, the smallest that timm has: convolutional, hybrid, ViT, channels last.
FAMILIES = {
    "test_resnet": 32,
    "test_convnext": 32,
    "test_efficientnet": 32,
    "fastvit_t8": 32,
    "efficientvit_b0": 32,
    "test_vit": 16,
    "vit_tiny_r_s16_p8_224": 32,
}
MEAN = (0.25, 0.5, 0.75)
FULL_SIZE = {"resnet18": 32, "convnext_atto": 32, "efficientnet_lite0": 32, "repvit_m0_9": 32,
             "vit_tiny_patch16_224": 16, "swin_tiny_patch4_window7_224": 32}  # fmt: skip


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def trunk_of(name: str, **options: Any) -> TimmTrunk:
    """Return a trunk whose every weight and statistic matters."""
    settings = {"patch_size": {**FAMILIES, **FULL_SIZE}[name], "num_cls": 3, **options}
    torch.manual_seed(0)
    trunk = TimmTrunk(name, **settings)
    for key, value in trunk.named_buffers():
        if "running" in key:
            value.add_(torch.rand_like(value) / 4)
    with torch.no_grad():
        for parameter in trunk.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return trunk.eval()


def student_of(name: str, **options: Any) -> Student:
    torch.manual_seed(0)
    settings = {"size": "any", "patch_size": 32, "image_size": 0, "dims": DIMS, **options}
    return build_student(**settings, adaptor_hidden=16, backbone=name)


def by_timm(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """Return a timm model's features of images normalised by timm's own transform."""
    config = timm.data.resolve_model_data_config(model)
    mean, std = (torch.tensor(config[key]).view(3, 1, 1) for key in ("mean", "std"))
    found: torch.Tensor = model.forward_features((images - mean) / std)
    return found


def as_features(trunk: TimmTrunk, found: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    if found.ndim == 3:
        return found[:, -grid[0] * grid[1] :].transpose(1, 2).unflatten(2, grid)
    return found if found.shape[1] == trunk.width else found.permute(0, 3, 1, 2)


def check_family(name: str, patch: int) -> None:
    """Shapes, values, determinism in eval, and gradients in training."""
    trunk = trunk_of(name)
    grids = [(2, 5), (3, 3), (4, 1)]
    for grid in grids:
        images = torch.rand(2, 3, *(side * patch for side in grid))
        with torch.no_grad():
            output, again, alone = trunk(images), trunk(images), trunk(images[1:])
            expected = as_features(trunk, by_timm(trunk.trunk, images), grid)
        assert output.features.shape == (2, trunk.width, *grid)
        assert output.cls.shape == (2, 3, trunk.width)
        assert output.registers.shape == (2, 0, trunk.width) and trunk.num_registers == 0
        torch.testing.assert_close(output.features, expected, rtol=1e-4, atol=1e-5)
        assert torch.equal(output.features, again.features) and torch.equal(output.cls, again.cls)
        assert rms_error(alone.features, output.features[1:]) < 1e-4
        assert output.features.std() > 0
    output = trunk.train()(torch.rand(3, 3, 3 * patch, 2 * patch))
    (output.features.pow(2).mean() + output.cls.sin().sum()).backward()
    for key, parameter in trunk.named_parameters():
        is_head = key.startswith(("trunk.head.", "trunk.fc_norm."))  # after forward_features
        assert is_head == (parameter.grad is None), key
        if parameter.grad is not None:
            assert parameter.grad.isfinite().all() and parameter.grad.any(), key


@pytest.mark.parametrize(("name", "patch"), FAMILIES.items())
def test_families(name: str, patch: int) -> None:
    check_family(name, patch)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "patch"), FULL_SIZE.items())
def test_families_in_the_sizes_that_are_used(name: str, patch: int) -> None:
    check_family(name, patch)


def test_bytes_and_floats_agree() -> None:
    trunk = trunk_of("test_resnet")
    pixels = torch.randint(0, 256, (1, 3, 64, 96), dtype=torch.uint8)
    with torch.no_grad():
        assert torch.equal(trunk(pixels).features, trunk(pixels.float() / 255).features)
    with pytest.raises(ValueError, match=r"expected uint8 or floats in \[0, 1\]"):
        trunk(pixels.float())


@pytest.mark.parametrize("name", ["test_resnet", "test_vit"])
def test_pooling_is_attention_and_starts_as_the_mean(name: str) -> None:
    trunk = trunk_of(name)
    images = torch.rand(2, 3, 64, 96)
    with torch.no_grad():
        trunk.query.normal_()
        found = trunk(images).cls
        tokens = by_timm(trunk.trunk, images).double()
        tokens = tokens if tokens.ndim == 3 else tokens.flatten(2).transpose(1, 2)
        centred = tokens - tokens.mean(-1, keepdim=True)
        keys = centred / (centred.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
        logits = torch.einsum("qc,btc->bqt", trunk.query.double(), keys) / trunk.width**0.5
        expected = torch.einsum("bqt,btc->bqc", logits.softmax(-1), tokens)
        assert rms_error(found, expected) < 1e-5
        trunk.query.zero_()
        assert rms_error(trunk(images).cls, tokens.mean(1, keepdim=True).expand(-1, 3, -1)) < 1e-5


def test_a_student_on_a_trunk() -> None:
    student = student_of("test_convnext").train()
    outputs = student(torch.rand(2, 3, 64, 96))
    assert outputs["words"].summary is not None and outputs["words"].summary.shape == (2, 12)
    assert outputs["edges"].summary is None
    assert outputs["parts"].features.shape == (2, 7, 2, 3)
    sum(output.features.pow(2).mean() for output in outputs.values()).backward()
    assert student.backbone.num_cls == 2 and student.backbone.query.grad is None
    fine = student_of("test_convnext", upsample=2)(torch.rand(1, 3, 64, 96))
    assert fine["parts"].features.shape == (1, 7, 4, 6)
    again = student_of("test_convnext")
    again.load_state_dict(copy.deepcopy(student).state_dict())


@pytest.mark.parametrize("options", [{"merge_per_block": 2}, {"window": 2}])
def test_merging_and_windows_are_refused(options: dict[str, int]) -> None:
    student = student_of("test_resnet")
    with pytest.raises(ValueError, match=r"merge_per_block=. and window=.*test_resnet.*student\."):
        student(torch.rand(1, 3, 64, 64), **options)


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"patch_size": 16}, r"stride of 32 px and student\.patch_size is 16; .*patch_size=32"),
        ({"name": "resnet_of_nobody"}, r"'resnet_of_nobody', which is no timm model"),
        ({"name": "hf-hub:nobody/resnet"}, r"'hf-hub:nobody/resnet', which is no timm model"),
        ({"name": "resnet18.nobody"}, r"'resnet18\.nobody', which timm cannot build"),
        ({"name": "coatnet_nano_rw_224"}, r"takes no picture of 64 x 96 px"),
        ({"layer_scale": 0.1}, r"student\.layer_scale is 0\.1 and student\.backbone"),
        ({"num_windowed": 2}, r"student\.num_windowed is 2 and student\.backbone"),
        ({"drop_path": 1.0}, r"drop_path is 1\.0"),
        ({"name": "vgg11", "drop_path": 0.1}, r"vgg11 has no stochastic depth"),
    ],
)
def test_trunks_that_cannot_be(options: dict[str, Any], what: str) -> None:
    settings = dict(options)
    with pytest.raises(ValueError, match=what):
        student_of(settings.pop("name", "test_resnet"), **settings)


def test_sides_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"80 px.*64 and 96"):
        trunk_of("test_resnet")(torch.zeros(1, 3, 64, 80))


# options


def test_drop_path_is_timms() -> None:
    trunk = trunk_of("test_convnext", drop_path=0.5)
    rates = [m.drop_prob for m in trunk.modules() if isinstance(m, timm.layers.DropPath)]
    theirs = timm.create_model("test_convnext", drop_path_rate=0.5)
    assert rates and rates == [
        m.drop_prob for m in theirs.modules() if isinstance(m, timm.layers.DropPath)
    ]


@pytest.mark.parametrize("name", ["test_convnext", "test_vit"])
def test_checkpointing_keeps_the_gradients(name: str) -> None:
    images = torch.rand(2, 3, 64, 96)
    found = []
    for twice in (False, True):
        trunk = trunk_of(name, checkpointing=twice).train()
        assert any(getattr(m, "grad_checkpointing", False) for m in trunk.modules()) is twice
        trunk(images).features.pow(2).mean().backward()
        found.append([p.grad for p in trunk.parameters() if p.grad is not None])
    assert all(map(torch.equal, *found)) and len(found[0]) > 20


def test_spectral_weights_go_out_as_plain_ones() -> None:
    plain = student_of("test_vit", patch_size=16).eval()
    student = student_of("test_vit", patch_size=16, spectral=True)
    images = torch.rand(1, 3, 48, 64)
    with torch.no_grad():
        assert rms_error(student.eval().backbone(images).features,
                         plain.backbone(images).features) < 1e-4  # fmt: skip
    student.train()(images)["words"].features.sum().backward()
    state = materialise_spectral(student.state_dict())
    assert any("qkv.parametrizations" in key for key in student.state_dict())
    assert state.keys() == plain.state_dict().keys()
    plain.load_state_dict(state)
    with torch.no_grad():
        found, expected = plain.backbone(images), student.eval().backbone(images)
    assert rms_error(found.features, expected.features) < 1e-5


# start


@pytest.mark.parametrize("layout", ["safetensors", "pth", "folder", "student"])
def test_a_weight_file_starts_the_trunk(tmp_path: Path, layout: str) -> None:
    """A classifier of any number of classes is left out; a folder says how pixels are prepared."""
    theirs = shaken(timm.create_model("test_efficientnet", num_classes=7))
    path = tmp_path / "w.safetensors"
    if layout == "pth":
        path = tmp_path / "w.pth"
        torch.save({"state_dict": theirs.state_dict()}, path)
    elif layout == "folder":
        path = tmp_path
        save_file(
            {f"timm_model.{key}": value for key, value in theirs.state_dict().items()},
            tmp_path / "model.safetensors",
        )
        config = {"architecture": "test_efficientnet.a_tag", "pretrained_cfg": {"mean": MEAN}}
        (tmp_path / "config.json").write_text(json.dumps(config))
    else:
        save_file(theirs.state_dict(), path)
    if layout == "student":
        trunk = student_of("test_efficientnet", init=str(path)).backbone
    else:
        load_trunk(trunk := trunk_of("test_efficientnet"), path)
    if layout == "folder":
        theirs.pretrained_cfg["mean"] = MEAN
    images = torch.rand(1, 3, 64, 96)
    with torch.no_grad():
        assert torch.equal(trunk.eval()(images).features, by_timm(theirs, images))


def test_timms_own_weights_are_asked_for_by_a_word(monkeypatch: pytest.MonkeyPatch) -> None:
    real, asked = timm.create_model, []

    def offline(name: str, pretrained: bool = False, **options: Any) -> nn.Module:
        asked.append(pretrained)
        return real(name, pretrained=False, **options)

    monkeypatch.setattr(timm_trunk.timm, "create_model", offline)
    student_of("test_resnet")
    assert asked == [False, False]  # on no device, then in earnest
    student_of("test_resnet", init="pretrained")
    assert asked == [False, False, False, True]


def test_weights_that_do_not_fit(tmp_path: Path) -> None:
    trunk = trunk_of("test_resnet")
    save_file(timm.create_model("test_convnext").state_dict(), tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match=r"does not fit student\.backbone test_resnet: .*Missing"):
        load_trunk(trunk, tmp_path / "w.safetensors")
    with pytest.raises(FileNotFoundError, match=r"gone\.pth does not exist.*'pretrained'"):
        load_trunk(trunk, tmp_path / "gone.pth")


# transformers


def write_wrapped(trunk: TimmTrunk, folder: Path, image_size: int = 96) -> Path:
    folder.mkdir()
    save_file(timm_state(trunk), folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(timm_config(trunk, image_size)))
    return folder


@pytest.mark.parametrize("name", FAMILIES)
def test_automodel_reads_the_trunk_without_remote_code(tmp_path: Path, name: str) -> None:
    trunk = trunk_of(name)
    folder = write_wrapped(trunk, tmp_path / "wrapped")
    judge, info = AutoModel.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    pixels = torch.randint(0, 256, (1, 3, 3 * trunk.patch_size, 2 * trunk.patch_size))
    pixels = pixels.to(torch.uint8)
    with torch.no_grad():
        output = judge.eval()(pixel_values=trunk.input_conditioner(pixels))
        found = trunk(pixels).features
    expected = as_features(trunk, output.last_hidden_state, (3, 2))
    assert output.pooler_output is None and rms_error(found, expected) < 1e-6
    load_trunk(again := trunk_of(name), folder)
    with torch.no_grad():
        assert torch.equal(again(pixels).features, found)


def test_the_image_processor_prepares_what_the_trunk_would(tmp_path: Path) -> None:
    trunk = trunk_of("test_resnet")
    folder = write_wrapped(trunk, tmp_path / "wrapped")
    pixels = np.random.default_rng(0).integers(0, 256, (96, 96, 3), dtype=np.uint8)
    found = AutoImageProcessor.from_pretrained(folder)(Image.fromarray(pixels))["pixel_values"]
    expected = trunk.input_conditioner(torch.from_numpy(pixels).permute(2, 0, 1)[None])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    wide = Image.fromarray(pixels[:32])
    assert AutoImageProcessor.from_pretrained(folder)(wide)["pixel_values"].shape[-2:] == (96, 96)
