"""A fused folder, judged by the student and by transformers' RadioModel."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from small_encoder import (
    DIMS,
    SIZES_PX,
    change_config,
    photographs,
    seeded_radio_model,
    small_weights,
    write_small,
)
from test_student import rms_error, small_vit
from tiny import tiny_config
from transformers import (
    AutoModel,
    RadioModel,
)

import radio
from radio.encoder.card import model_card
from radio.encoder.encoder import Encoder
from radio.encoder.folder import config_of, write_folder
from radio.errors import RadioError
from radio.training.checkpoint import find_checkpoint
from radio.training.distill import distill
from student.model import Student, build_student
from student.vit import SIZES


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)  # the models are too small for two


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = tiny_config(tmp_path_factory.mktemp("run"), steps=1)
    config.data.val = None
    return distill(config).out


@pytest.fixture(scope="module")
def fused(run: Path) -> Path:
    return radio.fuse(run, run.parent / "encoder")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small(tmp_path_factory.mktemp("small") / "encoder")


@pytest.fixture(scope="module")
def encoder(small: Path) -> Encoder:
    return radio.load(small)


# the same weights in transformers


def judge_of(folder: Path) -> RadioModel:
    model, info = AutoModel.from_pretrained(
        folder, output_loading_info=True, trust_remote_code=False
    )
    assert isinstance(model, RadioModel)
    assert not any(info.values()), info
    return model.eval()


def compare(ours: Encoder, judge: RadioModel, sizes: list[tuple[int, int]], most: float) -> None:
    for size in sizes:
        images = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(size[0]))
        found = ours.encode(images)
        with torch.no_grad():
            expected = judge(pixel_values=images.to(judge.dtype))
        assert found["features"].shape == (2, size[0] * size[1] // 256, judge.config.hidden_size)
        assert rms_error(found["summary"], expected.summary) < most, size
        assert rms_error(found["features"], expected.features) < most, size
        assert expected.features.std() > 0.1


def test_transformers_computes_the_same(small: Path, encoder: Encoder) -> None:
    compare(encoder, judge_of(small), SIZES_PX, 1e-6)


def test_transformers_computes_the_same_in_float64(small: Path) -> None:
    ours = radio.load(small, dtype=torch.float64)
    compare(ours, judge_of(small).double(), SIZES_PX, 1e-12)


def test_transformers_computes_the_same_with_layer_scale(tmp_path: Path) -> None:
    """The folder has LayerScale folded, and neither reader loses it."""
    weights = small_weights(layer_scale=0.3)
    write_folder(weights, model_card(weights), tmp_path / "encoder")
    assert not any("ls1" in key or "scale" in key for key in weights.backbone)
    ours = radio.load(tmp_path / "encoder")
    compare(ours, judge_of(tmp_path / "encoder"), SIZES_PX, 1e-6)
    images = torch.rand(2, 3, 64, 96)
    with torch.no_grad():
        unfolded = small_vit(layer_scale=0.3).eval()(images)
    features = unfolded.features.flatten(2).transpose(1, 2)
    assert rms_error(ours.encode(images)["features"], features) < 1e-6


def test_transformers_computes_the_same_after_a_real_run(fused: Path) -> None:
    compare(radio.load(fused), judge_of(fused), [(64, 64), (32, 48), (96, 80)], 1e-6)


@pytest.mark.parametrize(
    "options",
    [{}, {"layerscale_value": 0.4}, {"patch_size": 8, "mlp_ratio": 3.7, "summary_idxs": [1]}],
)
def test_a_folder_of_transformers_loads_as_an_encoder(
    options: dict[str, Any], tmp_path: Path
) -> None:
    judge = seeded_radio_model(**options)
    judge.save_pretrained(tmp_path / "theirs")
    ours = radio.load(tmp_path / "theirs")
    assert ours.feature_names == ("summary", "features")
    patch = judge.config.patch_size
    for rows, columns in ((8, 8), (4, 6), (6, 4), (11, 9), (16, 16)):
        images = torch.rand(2, 3, rows * patch, columns * patch)
        with torch.no_grad():
            expected = judge(pixel_values=images)
        found = ours.encode(images)
        assert rms_error(found["summary"], expected.summary) < 1e-6
        assert rms_error(found["features"], expected.features) < 1e-6
    radio.fuse(tmp_path / "theirs", tmp_path / "ours")
    again, info = AutoModel.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info.values())
    with torch.no_grad():
        assert rms_error(again(pixel_values=images).features, expected.features) < 1e-6


def test_both_state_dicts_hold_the_same_tensors(tmp_path: Path) -> None:
    judge = seeded_radio_model()
    judge.save_pretrained(tmp_path)
    ours = radio.load(tmp_path).backbone.state_dict()
    theirs = judge.state_dict()
    for number in range(3):
        prefix = f"encoder.layer.{number}.attention"
        joined = torch.cat([theirs[f"{prefix}.{part}_proj.bias"] for part in "qkv"])
        assert torch.equal(ours[f"blocks.{number}.attn.qkv.bias"], joined)
    table = theirs["embeddings.position_embedding"]
    assert torch.equal(ours["patch_generator.pos_embed"], table)
    assert torch.equal(ours["input_conditioner.norm_std"], theirs["input_conditioner.norm_std"])


@pytest.mark.parametrize(
    ("option", "value"), [("hidden_act", "relu"), ("layer_norm_eps", 1e-5), ("num_channels", 4)]
)
def test_a_radio_model_that_ours_cannot_be_is_refused(
    option: str, value: object, tmp_path: Path
) -> None:
    settings = {} if option == "num_channels" else {option: value}
    seeded_radio_model(**settings).save_pretrained(tmp_path)
    change_config(tmp_path, {option: value})
    with pytest.raises(RadioError, match=rf"config\.json has {option} {value!r}.*can only have"):
        radio.load(tmp_path)


def test_transformers_gets_the_mlp_width_of_every_size() -> None:
    weights = small_weights()
    for shape in SIZES.values():
        narrow = torch.zeros(shape.mlp_hidden, shape.width)
        changed = {**weights.backbone, "blocks.0.mlp.fc1.weight": narrow}
        config = json.loads(json.dumps(config_of(replace(weights, backbone=changed))))
        assert int(config["hidden_size"] * config["mlp_ratio"]) == shape.mlp_hidden


# fused from a run


def student_of(run: Path) -> tuple[Student, Any]:
    checkpoint = find_checkpoint(run)
    config = checkpoint.config.student
    student = build_student(
        size=config.size,
        patch_size=config.patch_size,
        image_size=config.image_size,
        dims=DIMS,
        adaptor_hidden=config.adaptor_hidden,
    )
    student.load_state_dict(checkpoint.model)
    return student.eval(), checkpoint


def test_a_fused_encoder_is_the_student_and_the_inverse_standardizer(
    run: Path, fused: Path
) -> None:
    student, checkpoint = student_of(run)
    encoder = radio.load(fused)
    names = [name for name in encoder.feature_names if ":" in name]
    assert names == [
        "words:summary", "words:features", "parts:summary", "parts:features", "edges:features",
    ]  # fmt: skip
    images = photographs(3)
    found = encoder.encode(images, ["summary", "features", *names])
    with torch.no_grad():
        outputs = student(images)
    for name, output in outputs.items():
        predicted = output.features.flatten(2).transpose(1, 2).double()
        expected = checkpoint.standardizers[name].inverse_transform(predicted)
        assert rms_error(found[f"{name}:features"].double(), expected) < 1e-5, name
        assert rms_error(predicted, expected) > 0.01, "the standardizer does nothing"
        if output.summary is not None:
            assert rms_error(found[f"{name}:summary"], output.summary) < 1e-5, name
    assert found["features"].shape == (3, 12, 192) and found["summary"].shape == (3, 2 * 192)
    assert not torch.equal(found["words:summary"][0], found["words:summary"][1])


def test_the_config_says_what_was_fused(run: Path, fused: Path) -> None:
    config = json.loads((fused / "config.json").read_text())
    assert {name: block["cls_row"] for name, block in config["adaptors"].items()} == {
        "words": 0, "parts": 1, "edges": None,
    }  # fmt: skip
    assert config["adaptors"]["words"]["feature_dim"] == 8
    assert "summary_dim" not in config["adaptors"]["edges"]
    assert (config["num_cls_tokens"], config["num_registers"]) == (2, 6)
    assert config["image_size"] == 64
    assert (config["vitdet_num_windowed"], config["vitdet_num_global"]) == (None, 4)
    found = find_checkpoint(run)
    assert config["origin"] == {"step": 1, "views": found.views_seen, "data": found.state["data"]}
    checkpoint = found.config
    for name, block in config["adaptors"].items():
        assert block["options"] == checkpoint.teachers[name].options
        assert (block["kind"], block["pretrained"], block["seed"]) == ("fake", None, 0)
    fingerprint = find_checkpoint(run).state["teachers"]["words"]["fingerprint"]
    assert config["adaptors"]["words"]["fingerprint"] == fingerprint
    card = (fused / "README.md").read_text()
    assert "| fake | seeded, not trained | 12 |" in card
    assert fingerprint[:12] in card and 'features=("summary", "words:summary"' in card


def test_a_step_folder_and_an_encoder_folder_can_be_fused_too(
    run: Path, fused: Path, tmp_path: Path
) -> None:
    expected = radio.load(fused).fingerprint
    for source in (run / "checkpoints" / "step-000001", fused):
        again = radio.fuse(source, tmp_path / source.name)
        assert radio.load(again).fingerprint == expected
        theirs, ours = (json.loads((f / "config.json").read_text()) for f in (fused, again))
        assert ours == theirs
        assert (again / "README.md").read_text() == (fused / "README.md").read_text()


def test_a_damaged_checkpoint_is_named_and_nothing_written(run: Path, tmp_path: Path) -> None:
    step = shutil.copytree(run / "checkpoints" / "step-000001", tmp_path / "step-000001")
    data = bytearray((step / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (step / "model.safetensors").write_bytes(data)
    with pytest.raises(RadioError, match=r"step-000001.model\.safetensors is missing or damaged"):
        radio.fuse(step, tmp_path / "encoder")
    assert not (tmp_path / "encoder").exists()
    with pytest.raises(RadioError, match=r"nowhere is neither a run folder"):
        radio.fuse(tmp_path / "nowhere", tmp_path / "encoder")
