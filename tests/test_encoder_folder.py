"""The encoder folder on disk: whole, protected, and explained when it is broken."""

from __future__ import annotations

import json
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from picture_zoo import colours
from PIL import Image
from safetensors.torch import load_file, save_file
from small_encoder import change_config, head, seeded_radio_model, small_weights, write_small
from test_student import rms_error
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    PreTrainedConfig,
    RadioConfig,
)

import radio
from radio.encoder import folder as folder_module
from radio.encoder.encoder import Encoder
from radio.encoder.folder import config_of, read_weights, write_folder
from radio.encoder.weights import TeacherHeads, build_backbone
from radio.errors import RadioError
from radio.training.checkpoint import check_sums


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)  # the models are too small for two


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small(tmp_path_factory.mktemp("small") / "encoder")


@pytest.fixture(scope="module")
def encoder(small: Path) -> Encoder:
    return radio.load(small)


def copied(small: Path, tmp_path: Path) -> Path:
    return shutil.copytree(small, tmp_path / "copy")


def test_a_folder_is_whole_and_its_sums_verify(small: Path) -> None:
    assert {path.name for path in small.iterdir()} == set(folder_module.FILES)
    check_sums(small)
    done = subprocess.run(
        ["sha256sum", "--strict", "-c", "SHA256SUMS"], cwd=small, capture_output=True, text=True
    )
    assert done.returncode == 0 and done.stdout.count(": OK") == 5, done.stderr
    assert list(small.parent.iterdir()) == [small]


def test_the_config_is_transformers_own(small: Path) -> None:
    config = AutoConfig.from_pretrained(small)
    assert isinstance(config, RadioConfig)
    ours = json.loads((small / "config.json").read_text())
    known = RadioConfig().to_dict()
    windows = {"vitdet_num_windowed", "vitdet_num_global"}
    extra = {"adaptors", "origin", "cpe_align_corners", *windows}
    assert set(ours) - set(known) == extra, "neither RadioConfig's nor ours"
    derived = {"patch_dim", "video_patch_dim"}
    assert set(known) - set(ours) <= {*PreTrainedConfig().to_dict(), *derived}


def test_the_processor_makes_the_pixels_that_encode_makes(small: Path, encoder: Encoder) -> None:
    processor = AutoImageProcessor.from_pretrained(small)
    picture = colours(90, 70)
    pixels = processor(picture, return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 3, 64, 64)
    resized = torch.from_numpy(np.array(picture.resize((64, 64), Image.Resampling.BICUBIC)))
    assert (pixels[0] - resized.permute(2, 0, 1) / 255).abs().max() <= 2 / 255
    same = processor(colours(64, 64), return_tensors="pt")["pixel_values"]
    found, expected = (encoder.encode(form)["summary"] for form in (same, colours(64, 64)))
    assert rms_error(found, expected) < 1e-6


def test_a_truncated_file_is_named_with_the_way_out(small: Path, tmp_path: Path) -> None:
    for name in ("model.safetensors", "adaptors.safetensors"):
        folder = copied(small, tmp_path)
        data = (folder / name).read_bytes()
        for length in (0, 5, 100, len(data) // 2, len(data) - 1):
            (folder / name).write_bytes(data[:length])
            with pytest.raises(RadioError, match=rf"copy.{name} is .*no whole.*`radio fuse`"):
                radio.load(folder)
        shutil.rmtree(folder)


def test_a_missing_file_is_named_with_the_way_out(small: Path, tmp_path: Path) -> None:
    folder = copied(small, tmp_path)
    (folder / "adaptors.safetensors").unlink()
    with pytest.raises(RadioError, match=r"copy.adaptors\.safetensors is missing.*`radio fuse`"):
        radio.load(folder)
    for name in ("model.safetensors", "config.json"):
        (folder / name).unlink()
        with pytest.raises(RadioError, match=r"copy is no encoder folder.*radio fuse.*found"):
            radio.load(folder)
    (tmp_path / "empty").mkdir()
    with pytest.raises(RadioError, match=r"expected config\.json and model.*found nothing"):
        radio.load(tmp_path / "empty")
    with pytest.raises(RadioError, match=r"nowhere does not exist; expected an encoder folder"):
        radio.load(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("changes", "drop", "words"),
    [
        ({"model_type": "clip"}, None, r"config\.json has model_type 'clip'; expected 'radio'"),
        ({}, "model_type", r"config\.json has model_type None; expected 'radio'"),
        ({}, "num_cls_tokens", r"config\.json lacks num_cls_tokens.*`radio fuse`"),
        ({}, "num_attention_heads", r"config\.json lacks num_attention_heads"),
        ({"num_cls_tokens": 2}, None, r"'summary' reads the CLS rows \[0, 2\].*2 are said"),
        ({"num_cls_tokens": 99}, None, r"8 prefix tokens, of which 99"),
        ({"num_hidden_layers": 4}, None, r"3 blocks but its config\.json says 4"),
        ({"args": None, "model_type": "vit"}, None, "model_type 'vit'"),
    ],
)
def test_a_config_that_does_not_fit_is_named(
    changes: dict[str, object], drop: str | None, words: str, small: Path, tmp_path: Path
) -> None:
    folder = copied(small, tmp_path)
    change_config(folder, changes, drop)
    with pytest.raises(RadioError, match=words):
        radio.load(folder)


@pytest.mark.parametrize("data", [b"{", b"\xff\xfe\x00", b"[]", b""])
def test_a_config_that_is_no_settings_is_named(data: bytes, small: Path, tmp_path: Path) -> None:
    folder = copied(small, tmp_path)
    (folder / "config.json").write_bytes(data)
    with pytest.raises(RadioError, match=r"copy.config\.json (is no JSON|holds a list)"):
        radio.load(folder)


def test_heads_that_are_missing_or_cut_are_named(small: Path, tmp_path: Path) -> None:
    folder = copied(small, tmp_path)
    heads = load_file(folder / "adaptors.safetensors")
    whole = {key: value for key, value in heads.items() if not key.startswith("words.summary.")}
    save_file(whole, folder / "adaptors.safetensors")
    with pytest.raises(RadioError, match=r"adaptors\.safetensors lacks the head words:summary"):
        radio.load(folder)
    for lost in ("fc1.weight", "final.2.weight", "final.0.bias", "blocks.0.2.weight"):
        key = f"words.features.{lost}"
        save_file({k: v for k, v in heads.items() if k != key}, folder / "adaptors.safetensors")
        with pytest.raises(RadioError, match=rf"words:features.*{lost}"):
            radio.load(folder)


def test_backbone_keys_that_are_missing_or_wrong_are_named(small: Path, tmp_path: Path) -> None:
    folder = copied(small, tmp_path)
    whole = load_file(folder / "model.safetensors")
    for lost in ("blocks.1.norm1.weight", "patch_generator.pos_embed", "blocks.0.mlp.fc1.weight"):
        kept = {key: value for key, value in whole.items() if not key.endswith(lost)}
        save_file(kept, folder / "model.safetensors")
        with pytest.raises(RadioError, match=lost):
            radio.load(folder)
    wrong = {**whole, "radio_model.model.blocks.1.norm1.weight": torch.zeros(7)}
    save_file(wrong, folder / "model.safetensors")
    with pytest.raises(RadioError, match=r"norm1\.weight.*size mismatch|size mismatch.*norm1"):
        radio.load(folder)


def test_a_model_in_several_files_is_read_whole_or_refused(tmp_path: Path) -> None:
    judge = seeded_radio_model()
    judge.save_pretrained(tmp_path, max_shard_size="200KB")
    files = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(files) > 2
    images = torch.rand(1, 3, 32, 32)
    with torch.no_grad():
        expected = judge(pixel_values=images).features
    assert rms_error(radio.load(tmp_path).encode(images)["features"], expected) < 1e-6
    files[-1].unlink()
    with pytest.raises(RadioError, match=rf"{files[-1].name} is missing"):
        radio.load(tmp_path)


def test_files_of_the_user_are_never_destroyed(small: Path, tmp_path: Path) -> None:
    weights = read_weights(small)
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("years")
    with pytest.raises(RadioError, match=r"foreign exists and is no encoder folder"):
        write_folder(weights, "", foreign)
    beside = copied(small, tmp_path)
    (beside / "thesis.tex").write_text("years")
    with pytest.raises(RadioError, match=r"also holds thesis\.tex.*would delete"):
        write_folder(weights, "", beside)
    other = tmp_path / "other"
    seeded_radio_model().save_pretrained(other)
    with pytest.raises(RadioError, match=r"other exists and is no encoder folder"):
        write_folder(weights, "", other)
    file = tmp_path / "file"
    file.write_text("years")
    with pytest.raises(RadioError, match=r"file exists and is no encoder folder"):
        write_folder(weights, "", file)
    assert (foreign / "thesis.tex").exists() and (beside / "thesis.tex").exists()
    assert file.read_text() == "years"
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"foreign", "copy", "other", "file"}


def test_an_older_encoder_is_replaced_and_an_empty_folder_filled(tmp_path: Path) -> None:
    (tmp_path / "encoder").mkdir()
    first = radio.load(write_small(tmp_path / "encoder")).fingerprint
    second = radio.load(write_small(tmp_path / "encoder", summary_rows=(1,))).fingerprint
    assert first != second
    assert [path.name for path in tmp_path.iterdir()] == ["encoder"]
    written = write_small(tmp_path / "deep" / "er" / "encoder")
    assert radio.load(written).fingerprint == first


def test_a_link_and_the_current_folder_can_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, link = tmp_path / "real", tmp_path / "link"
    write_small(real)
    link.symlink_to(real)
    write_small(link, summary_rows=(1,))
    assert link.is_symlink() and radio.load(real).summary_rows == [1]
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    write_small(Path("."))
    assert radio.load(tmp_path / "here").summary_rows == [0, 2]
    assert {path.name for path in tmp_path.iterdir()} == {"real", "link", "here"}


@pytest.mark.parametrize("at", ["write", "rename"])
def test_a_write_that_fails_leaves_the_older_encoder(
    at: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_small(tmp_path / "encoder")
    before = radio.load(folder).fingerprint
    rename = Path.rename

    def failing(self: Path, target: Path) -> Path:
        if self.name.startswith(".tmp-"):
            raise OSError("the disk is gone")
        return rename(self, target)

    def full(*_: object) -> None:
        raise OSError("no space left")

    if at == "rename":
        monkeypatch.setattr(Path, "rename", failing)
    else:
        monkeypatch.setattr(folder_module, "write_sums", full)
    with pytest.raises(OSError, match=r"the disk is gone|no space left"):
        write_small(folder, summary_rows=(1,))
    monkeypatch.undo()
    assert radio.load(folder).fingerprint == before
    assert [path.name for path in tmp_path.iterdir()] == ["encoder"]


def test_weights_that_cannot_be_loaded_are_not_written(tmp_path: Path) -> None:
    theirs = tmp_path / "theirs"
    seeded_radio_model().save_pretrained(theirs)
    change_config(theirs, {"num_cls_tokens": 2})  # but the summary reads row 2
    with pytest.raises(RadioError, match="'summary' reads the CLS rows"):
        radio.fuse(theirs, tmp_path / "ours")
    assert not (tmp_path / "ours").exists()
    weights = small_weights()
    rowless = {"words": replace(weights.teachers["words"], cls_row=None)}
    with pytest.raises(RadioError, match="'words:summary' reads the CLS rows"):
        build_backbone(replace(weights, teachers=rowless))


def test_vllm_is_told_only_of_vits_that_it_knows(small: Path) -> None:
    weights = read_weights(small)
    assert "model_name" not in config_of(weights)
    width, state = 384, dict(weights.backbone)
    state["blocks.0.mlp.fc1.weight"] = torch.zeros(4 * width, width)
    teachers = {
        name: TeacherHeads(row, {"summary": head(96, 4)}) for name, row in (("b", 1), ("a", 0))
    }
    known = config_of(replace(weights, backbone=state, num_cls=2, teachers=teachers))
    assert known["model_name"] == "vit_small_patch16_224" and known["cpe_max_size"] == 128
    assert [teacher["name"] for teacher in known["teachers"]] == ["a", "b"]
    assert known["register_multiple"] == 8
    assert "model_name" not in config_of(replace(weights, backbone=state, teachers=teachers))
