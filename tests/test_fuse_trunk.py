"""The encoder folder of a student on a timm trunk, judged by the student and by transformers."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from small_encoder import DIMS, change_config, head, photographs
from test_student import rms_error
from test_timm_student import trunk_of
from tiny import tiny_config
from transformers import AutoModel, TimmWrapperModel

import radio
from radio.config import Config, StudentConfig, TeacherConfig
from radio.encoder.card import model_card
from radio.encoder.encoder import Encoder
from radio.encoder.folder import read_weights, write_folder
from radio.encoder.fuse import weights_of
from radio.encoder.weights import (
    TeacherHeads,
    TrunkWeights,
    build_backbone,
    build_heads,
    filled_trunk,
)
from radio.errors import RadioError
from radio.targets.target_maker import TeacherFacts
from radio.training.checkpoint import check_sums, find_checkpoint
from radio.training.distill import distill
from radio.training.learner import student_for
from student.model import Student
from student.radio_layout import below, materialise_spectral
from teachers import build_teacher

NAMES = ("words:summary", "words:features", "parts:summary", "parts:features", "edges:features")


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = tiny_config(tmp_path_factory.mktemp("run"), steps=2)
    config.data.val = None
    config.student.backbone, config.student.patch_size = "test_resnet", 32
    config.stages[0].partitions["high"].merge_per_block = 0
    return distill(config).out


@pytest.fixture(scope="module")
def fused(run: Path) -> Path:
    return radio.fuse(run, run.parent / "encoder")


@pytest.fixture(scope="module")
def encoder(fused: Path) -> Encoder:
    return radio.load(fused)


FACTS = {
    name: TeacherFacts("fake", "-", dims.summary_dim, dims.feature_dim)
    for name, dims in DIMS.items()
}


def trained(run: Path) -> tuple[Student, Any]:
    checkpoint = find_checkpoint(run)
    student = student_for(checkpoint.config, FACTS)
    student.load_state_dict(checkpoint.model)
    return student.eval(), checkpoint


def tokens(features: torch.Tensor) -> torch.Tensor:
    return features.flatten(2).transpose(1, 2)


def trunk_weights(name: str, num_cls: int = 2) -> TrunkWeights:
    """Return an encoder on a trunk whose every weight, statistic, query and pixel mean matters."""
    trunk = trunk_of(name, num_cls=num_cls)
    with torch.no_grad():
        trunk.query.normal_()
        trunk.input_conditioner.norm_mean.add_(0.1)
        trunk.input_conditioner.norm_std.mul_(1.2)
    heads = {"summary": head(trunk.width, 5), "features": head(trunk.width, 6, 3, 1)}
    return TrunkWeights(trunk, {"words": TeacherHeads(1, heads)}, 96, {"step": 7})


def write(weights: TrunkWeights, folder: Path) -> Path:
    write_folder(weights, model_card(weights), folder)
    return folder


# fused from a run


def test_a_fused_encoder_is_the_student_and_the_inverse_standardizer(
    run: Path, encoder: Encoder
) -> None:
    student, checkpoint = trained(run)
    assert encoder.feature_names == ("summary", "features", *NAMES)
    images = photographs(3, 64, 96)
    found = encoder.encode(images, encoder.feature_names)
    with torch.no_grad():
        output = student.backbone(images)
        predictions = student.predict(output)
    assert found["summary"].shape == (3, 2 * student.backbone.width)
    assert rms_error(found["summary"], output.cls.flatten(1)) < 1e-5
    assert rms_error(found["features"], tokens(output.features)) < 1e-5
    for name, prediction in predictions.items():
        predicted = tokens(prediction.features).double()
        expected = checkpoint.standardizers[name].inverse_transform(predicted)
        assert rms_error(found[f"{name}:features"].double(), expected) < 1e-5, name
        assert rms_error(predicted, expected) > 0.01, "the standardizer does nothing"
        if prediction.summary is not None:
            assert rms_error(found[f"{name}:summary"], prediction.summary) < 1e-5, name
    assert encoder.feature_dims == {name: value.shape[-1] for name, value in found.items()}


def test_what_was_trained_is_in_the_folder(run: Path, fused: Path) -> None:
    state = load_file(fused / "model.safetensors")
    query = load_file(fused / "adaptors.safetensors")["backbone.query"]
    fresh = timm.create_model("test_resnet", num_classes=0).state_dict()
    assert state.keys() == fresh.keys()
    running = [key for key in state if "running_mean" in key]
    assert running and all(state[key].any() for key in running)
    assert all(int(state[key]) > 0 for key in state if key.endswith("num_batches_tracked"))
    assert query.shape == (2, state["layer4.0.bn2.weight"].shape[0]) and query.any()


def test_the_folder_is_transformers_own(run: Path, fused: Path) -> None:
    names = {"config.json", "model.safetensors", "adaptors.safetensors", "README.md", "SHA256SUMS"}
    assert {path.name for path in fused.iterdir()} == names
    check_sums(fused)
    config = json.loads((fused / "config.json").read_text())
    assert (config["model_type"], config["architecture"]) == ("timm_wrapper", "test_resnet")
    assert (config["patch_size"], config["num_cls_tokens"]) == (32, 2)
    assert config["pretrained_cfg"]["input_size"] == [3, 64, 64] and config["origin"]["step"] == 2
    rows = {name: block["cls_row"] for name, block in config["adaptors"].items()}
    assert rows == {"words": 0, "parts": 1, "edges": None}
    model, info = AutoModel.from_pretrained(
        fused, output_loading_info=True, trust_remote_code=False
    )
    assert isinstance(model, TimmWrapperModel) and not any(info.values()), info


def test_the_card_s_lines_give_the_features(
    fused: Path, encoder: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    card = (fused / "README.md").read_text()
    assert "One timm trunk, test_resnet" in card and "| fake | seeded, not trained | 12 |" in card
    lines = re.findall(r"```python\n(.*?)```", card, re.DOTALL)[0].replace("this-folder", ".")
    monkeypatch.chdir(fused)
    pixels = photographs(1, 64, 64)
    found: dict[str, Any] = {"picture": Image.fromarray(pixels[0].permute(1, 2, 0).numpy())}
    with torch.no_grad():
        exec(lines, found)
    expected = encoder.encode(pixels)["features"]
    assert rms_error(tokens(found["output"].last_hidden_state), expected) < 1e-5


def test_a_folder_can_be_fused_again(fused: Path, encoder: Encoder, tmp_path: Path) -> None:
    again = radio.fuse(fused, tmp_path / "again")
    assert radio.load(again).fingerprint == encoder.fingerprint
    ours, theirs = (json.loads((folder / "config.json").read_text()) for folder in (again, fused))
    assert ours == theirs
    assert (again / "README.md").read_text() == (fused / "README.md").read_text()


def test_a_run_whose_weights_do_not_fit_is_refused(run: Path, tmp_path: Path) -> None:
    checkpoint = find_checkpoint(run)
    del checkpoint.model["backbone.trunk.conv1.0.weight"]
    with pytest.raises(RadioError, match=r"do not fit the trunk, timm's test_resnet: .*conv1"):
        weights_of(checkpoint)


# read back


@pytest.mark.parametrize("name", ["test_convnext", "test_vit", "vit_tiny_r_s16_p8_224"])
def test_a_folder_gives_back_what_was_written(name: str, tmp_path: Path) -> None:
    weights = trunk_weights(name)
    state = torch.get_rng_state()
    encoder = radio.load(write(weights, tmp_path / "encoder"))
    assert torch.equal(torch.get_rng_state(), state)
    assert encoder.fingerprint == Encoder(weights).fingerprint
    patch = weights.trunk.patch_size
    images = torch.rand(2, 3, 3 * patch, 2 * patch)
    found = encoder.encode(images, encoder.feature_names)
    with torch.no_grad():
        output = weights.trunk(images)
        summary = build_heads(weights.teachers)["words"]["summary"](output.cls[:, 1])
    assert torch.equal(found["features"], tokens(output.features))
    assert torch.equal(found["summary"], output.cls.flatten(1))
    assert torch.equal(found["words:summary"], summary)
    judge = AutoModel.from_pretrained(tmp_path / "encoder").eval()
    with torch.no_grad():
        theirs = judge(weights.trunk.input_conditioner(images)).last_hidden_state
    theirs = theirs[:, -6:] if theirs.ndim == 3 else tokens(theirs)
    assert rms_error(found["features"], theirs) < 1e-6


def test_a_spectral_trunk_goes_out_plain() -> None:
    config = tiny_config_of("test_convnext")
    config.student.spectral = True
    student = student_for(config, FACTS).eval()
    state = materialise_spectral(below(student.state_dict(), "backbone."))
    assert any("parametrizations" in key for key in student.backbone.state_dict())
    plain = filled_trunk("test_convnext", 32, 2, state)
    images = photographs(1, 64, 96)
    with torch.no_grad():
        assert rms_error(plain(images).features, student.backbone(images).features) < 1e-5


def test_other_dtypes_normalise_in_float32(fused: Path, encoder: Encoder) -> None:
    images = photographs(2, 64, 64)
    expected = encoder.encode(images, encoder.feature_names)
    for dtype, most in ((torch.float64, 1e-5), (torch.bfloat16, 0.05)):
        cast = radio.load(fused, device="cpu", dtype=dtype)
        assert cast.backbone.input_conditioner.norm_mean.dtype == torch.float32
        assert cast.fingerprint != encoder.fingerprint
        found = cast.encode(images, encoder.feature_names)
        for name, value in found.items():
            assert value.dtype == dtype and cast.device.type == "cpu"
            assert rms_error(value.float(), expected[name]) < most, name


def test_the_fingerprint_is_of_the_model_too(fused: Path, encoder: Encoder) -> None:
    other = read_weights(fused)
    assert isinstance(other, TrunkWeights)
    assert Encoder(other).fingerprint == encoder.fingerprint
    other.trunk.name = "another_of_the_same_tensors"
    assert Encoder(other).fingerprint != encoder.fingerprint


def test_merging_works_on_a_trunk(encoder: Encoder) -> None:
    found = encoder.encode(photographs(2, 96, 96), ("features", "words:features"), merge_to=4)
    assert found["words:features"].shape == (2, 4, 8) and int(found["sizes"].sum()) == 18


def test_layers_and_windows_are_refused(encoder: Encoder) -> None:
    images = photographs(1, 64, 64)
    with pytest.raises(RadioError, match=r"no layers to ask for.*timm model; leave layers out"):
        encoder.encode(images, layers=(-1,))
    with pytest.raises(RadioError, match=r"unknown feature 'layer_0:features'.*edges:features$"):
        encoder.encode(images, "layer_0:features")
    with pytest.raises(RadioError, match=r"window is 2, .*timm's test_resnet.*leave it out"):
        encoder.encode(images, window=2)


@pytest.mark.parametrize(
    ("changes", "drop", "what"),
    [
        ({}, "patch_size", r"config\.json lacks patch_size; make the folder anew"),
        ({"pretrained_cfg": {"mean": [0, 0, 0]}}, None, r"config\.json lacks input_size, std"),
        ({"architecture": "hf-hub:someone/model"}, None, r"'hf-hub:someone/model', which is no"),
        ({"architecture": "test_convnext"}, None, r"do not fit the trunk, timm's test_convnext"),
        ({"num_cls_tokens": 3}, None, r"do not fit the trunk.*query"),
        ({"patch_size": 16}, None, r"stride of 32 px"),
        ({"model_type": "bert"}, None, r"'bert'; expected 'radio', 'timm_wrapper'"),
    ],
)
def test_a_config_that_does_not_fit_is_named(
    changes: dict[str, Any], drop: str | None, what: str, fused: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(fused, tmp_path / "encoder")
    change_config(folder, changes, drop)
    with pytest.raises(RadioError, match=what):
        radio.load(folder)


def test_a_folder_without_its_query_is_refused(fused: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(fused, tmp_path / "encoder")
    beside = load_file(folder / "adaptors.safetensors")
    del beside["backbone.query"]
    save_file(beside, folder / "adaptors.safetensors")
    with pytest.raises(RadioError, match=r"adaptors\.safetensors lacks backbone\.query"):
        radio.load(folder)


def test_a_head_on_a_row_that_is_not_there_is_refused() -> None:
    weights = trunk_weights("test_resnet", num_cls=1)
    with pytest.raises(RadioError, match=r"'words:summary' reads the CLS rows \[1\]"):
        build_backbone(weights)


# start and teacher


def tiny_config_of(backbone: str, init: Path | None = None) -> Config:
    student = StudentConfig(adaptor_hidden=32, backbone=backbone, patch_size=32)
    student.init = None if init is None else str(init)
    teachers = {name: TeacherConfig("fake") for name in FACTS}
    return Config(student=student, teachers=teachers)


def test_a_student_starts_from_the_folder(tmp_path: Path) -> None:
    weights = trunk_weights("test_resnet")
    folder = write(weights, tmp_path / "encoder")
    student = student_for(tiny_config_of("test_resnet", folder), FACTS).eval()
    images = photographs(1, 64, 96)
    with torch.no_grad():
        found, expected = student.backbone(images), weights.trunk(images)
    assert torch.equal(found.features, expected.features)
    assert not student.backbone.query.any()
    with pytest.raises(RadioError, match=r"holds timm's test_resnet; .*backbone=test_resnet"):
        student_for(tiny_config_of("test_convnext", folder), FACTS)


@pytest.mark.parametrize("name", ["test_resnet", "test_vit"])
def test_a_folder_is_a_teacher_without_a_summary(name: str, tmp_path: Path) -> None:
    weights = trunk_weights(name)
    folder = str(write(weights, tmp_path / "encoder"))
    options = {"folder": folder, "native_size": 96}
    teacher = build_teacher("encoder", "old", options, folder, 0)
    patch = weights.trunk.patch_size
    assert (teacher.stride, teacher.summary_dim) == (patch, None)
    assert teacher.feature_dim == weights.trunk.width
    images = torch.rand(2, 3, 2 * patch, 3 * patch)
    mean, std = (torch.tensor(value).view(3, 1, 1) for value in (teacher.mean, teacher.std))
    output = teacher((images - mean) / std)
    with torch.no_grad():
        expected = weights.trunk(images).features
    assert output.summary is None and rms_error(output.features, expected) < 1e-5
    seeded = [build_teacher("encoder", "old", options, None, seed) for seed in (0, 0, 1)]
    first, same, other = (item.fingerprint for item in seeded)
    assert first == same != other and first != teacher.fingerprint
    change_config(Path(folder), {}, "patch_size")
    with pytest.raises(ValueError, match=r"'timm_wrapper'; expected .* with a patch_size"):
        build_teacher("encoder", "old", options, folder, 0)
