"""Encoders that come with the package: found by looking, loaded by name, kept in half precision."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from picture_zoo import colours
from safetensors.torch import load_file, save_file
from small_encoder import photographs, write_small
from torch.nn.functional import normalize
from transformers import AutoModel

import radio
from radio.cli import main
from radio.config import load_teacher
from radio.data.photographs import held_out_pictures
from radio.encoder import shipped as shipped_module
from radio.encoder.images import resized
from radio.encoder.shipped import DEFAULT, HERE, default, shipped
from radio.errors import RadioError
from radio.evaluation.targets import resolve
from radio.training.checkpoint import check_sums
from teachers import Teacher, build_teacher


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder that is looked into instead of the package's own."""
    folder = tmp_path / "package"
    folder.mkdir()
    monkeypatch.setattr(shipped_module, "HERE", folder)
    monkeypatch.chdir(tmp_path)
    return folder


@pytest.mark.parametrize("name", shipped())
def test_what_ships_is_a_whole_encoder_of_at_most_15_mb(name: str) -> None:
    folder = shipped()[name]
    assert folder == HERE / name
    assert sum(file.stat().st_size for file in folder.iterdir()) <= 15e6
    check_sums(folder)
    stored = [value for file in folder.glob("*.safetensors") for value in load_file(file).values()]
    assert {value.dtype for value in stored} <= {torch.float16, torch.int64}
    card = (folder / "README.md").read_text()
    assert "research" in card
    assert f"{json.loads((folder / 'config.json').read_text())['origin']['views']:,} views" in card


def test_the_default_ships() -> None:
    assert default() == shipped()[DEFAULT]


POCKET = {name: load_teacher(f"pocket_{name}") for name in ("clip", "siglip", "dinov2", "sam")}


def test_the_pocket_encoder_is_of_the_teachers_that_ship() -> None:
    config = json.loads((shipped()["pocket"] / "config.json").read_text())
    for name, teacher in POCKET.items():
        facts = config["adaptors"][name]
        assert facts["fingerprint"] == build(name).fingerprint
        assert (facts["options"], facts["pretrained"]) == (teacher.options, teacher.pretrained)
        assert facts["weights_licence"] == "research only"


def build(name: str) -> Teacher:
    config = POCKET[name]
    return build_teacher(config.kind, name, config.options, config.pretrained, 0)


@torch.no_grad()
@pytest.mark.parametrize("name", POCKET)
def test_the_pocket_encoder_says_what_the_teacher_says(name: str) -> None:
    """Of photographs that neither has seen: what differs between places and pictures agrees."""
    encoder, teacher = radio.load("pocket"), build(name)
    side, outputs = teacher.native_size, (f"{name}:features", f"{name}:summary")
    pixels = torch.stack([resized(photo, 1, side) for photo in held_out_pictures().values()])
    mean, std = (torch.tensor(value).view(3, 1, 1) for value in (teacher.mean, teacher.std))
    expected = teacher((pixels.float() / 255 - mean) / std)
    found = encoder.encode(pixels, [one for one in outputs if one in encoder.feature_names])
    maps = found[outputs[0]].transpose(1, 2).unflatten(2, (side // 16, side // 16))
    maps = torch.nn.functional.interpolate(maps, expected.features.shape[2:], mode="bilinear")
    agreement = float((centred(maps) * centred(expected.features)).sum())
    assert agreement > {"clip": 0.2, "siglip": 0.2, "dinov2": 0.9, "sam": 0.85}[name]
    if expected.summary is not None:
        summaries = found[outputs[1]], expected.summary
        ours, theirs = (normalize(centred(each), dim=1) for each in summaries)
        assert float((ours * theirs).sum(dim=1).mean()) > 0.25


def centred(values: torch.Tensor) -> torch.Tensor:
    """Return [b, d, ...] less each channel's mean, of norm 1."""
    means = values.transpose(0, 1).flatten(1).mean(1)
    centred = values - means.view(1, -1, *[1] * (values.ndim - 2))
    return centred / centred.norm()


def test_names_are_found_by_looking(place: Path) -> None:
    assert shipped() == {}
    for name in ("pocket", "other"):
        write_small(place / name)
    (place / "__pycache__").mkdir()
    assert shipped() == {"other": place / "other", "pocket": place / "pocket"}


def test_a_name_loads_what_its_folder_loads(place: Path, tmp_path: Path) -> None:
    folder = write_small(place / "mine")
    expected = radio.load(folder).fingerprint
    assert radio.load("mine").fingerprint == radio.load(Path("mine")).fingerprint == expected
    target = resolve("mine")
    assert (target.name, target.fingerprint) == ("mine", expected)
    nearer = write_small(tmp_path / "mine", summary_rows=(1,))
    assert radio.load("mine").fingerprint == radio.load(nearer).fingerprint != expected


def test_an_unknown_name_lists_those_that_ship(place: Path) -> None:
    with pytest.raises(RadioError, match=r"mine does not exist.*none does here"):
        radio.load("mine")
    write_small(place / "ours")
    with pytest.raises(RadioError, match=r"mine does not exist; expected.*\.pth\.tar.*\(ours\)"):
        radio.load("mine")
    with pytest.raises(RadioError, match=r"unknown target 'mine'.*encoder that ships \(ours\)"):
        resolve("mine")


def test_half_precision_on_disk_is_float32_in_memory(tmp_path: Path) -> None:
    whole = radio.load(write_small(tmp_path / "whole"))
    radio.fuse(tmp_path / "whole", tmp_path / "half", half=True)
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("half", "whole")]
    assert sizes[0] < 0.6 * sizes[1]
    encoder = radio.load(tmp_path / "half")
    assert {value.dtype for value in encoder.state_dict().values()} == {torch.float32}
    images = photographs(2)
    found = encoder.encode(images, encoder.feature_names)
    for name, value in whole.encode(images, encoder.feature_names).items():
        assert found[name].dtype == torch.float32
        error = (found[name] - value).square().mean().sqrt() / value.square().mean().sqrt()
        assert 0 < error < 5e-3, name
    low = radio.load(tmp_path / "half", dtype=torch.bfloat16)
    assert low.encode(images, "words:summary")["words:summary"].dtype == torch.bfloat16
    for half in (False, True):
        fused = radio.fuse(tmp_path / "half", tmp_path / "again", half)
        assert radio.load(fused).fingerprint == encoder.fingerprint
    alone = AutoModel.from_pretrained(tmp_path / "half")
    assert {value.dtype for value in alone.parameters()} == {torch.float32}


def test_weights_too_large_for_half_precision_are_not_stored(tmp_path: Path) -> None:
    folder = write_small(tmp_path / "whole")
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in tensors if name.endswith("attn.qkv.bias"))
    tensors[name][0] = 1e5
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(RadioError, match=rf"{name} has values .* without --half"):
        radio.fuse(folder, tmp_path / "half", half=True)
    assert not (tmp_path / "half").exists()


def test_encode_takes_the_shipped_encoder_when_none_is_named(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("photos").mkdir()
    colours(64, 64).save("photos/a.png")
    monkeypatch.setattr(sys, "argv", ["radio", "encode", "photos", "-o", "features"])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    said = " ".join(capsys.readouterr().err.split())
    assert f"'{DEFAULT}' does not ship" in said and "--model" in said
    write_small(place / "other")
    with pytest.raises(RadioError, match=r"\(other\).*--model"):
        default()
    assert write_small(place / DEFAULT) == default()
    with pytest.raises(SystemExit) as stopped:
        main()
    assert not stopped.value.code
    assert "1 pictures encoded, 0 failed" in capsys.readouterr().out
