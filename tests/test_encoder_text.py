"""Encoder.encode_text: the text tower that goes with an adaptor, judged by open_clip."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from safetensors.torch import save_file
from small_encoder import change_config, head, photographs, small_weights, write_small
from test_teachers_upstream import shaken
from torch import nn

import radio
from radio.encoder.encoder import Encoder
from radio.encoder.weights import TeacherHeads
from radio.errors import RadioError
from teachers import build_teacher
from teachers.open_clip_tower import register_models
from teachers.text import zero_shot_weights

CLIP = {"kind": "clip", "options": {"model": "demo-clip"}, "pretrained": None, "seed": 7}
TEXTS = ["a photo of a cat", "two dogs, running"]


@pytest.fixture(autouse=True)
def _one_thread(_two_threads: None) -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Path]:
    """Return a CLIP of open_clip and the file of its weights."""
    register_models()
    model = shaken(open_clip.create_model("demo-clip"))
    path = tmp_path_factory.mktemp("clip") / "clip.safetensors"
    save_file(model.state_dict(), path)
    return model, path


def teachers(**facts: Any) -> dict[str, TeacherHeads]:
    """Return two that talk (one of another width than its text), one that does not, one old."""
    summary = head(96, 128)
    return {
        "clip": TeacherHeads(0, {"summary": summary}, facts={**CLIP, **facts}),
        "narrow": TeacherHeads(1, {"summary": head(96, 12)}, facts=CLIP),
        "parts": TeacherHeads(2, {"summary": head(96, 6)}, facts={"kind": "dinov2"}),
        "silent": TeacherHeads(None, {"features": head(96, 6)}, facts=CLIP),
    }


def encoder_with(**facts: Any) -> Encoder:
    return Encoder(replace(small_weights(), teachers=teachers(**facts)))


def expected(model: nn.Module, texts: list[str]) -> torch.Tensor:
    with torch.no_grad():
        vectors: torch.Tensor = model.encode_text(
            open_clip.get_tokenizer("demo-clip")(texts), normalize=True
        )
    return vectors


def test_texts_are_open_clip_s_of_the_weights_that_the_folder_names(
    whole: tuple[nn.Module, Path], tmp_path: Path
) -> None:
    model, path = whole
    named = teachers(pretrained=str(path))
    folder = write_small(tmp_path / "encoder", teachers=named)
    encoder = radio.load(folder)
    found = encoder.encode_text(TEXTS)
    assert torch.equal(found, expected(model, TEXTS))
    assert torch.equal(encoder.encode_text(TEXTS[0], "clip"), expected(model, TEXTS[:1]))
    again = radio.load(radio.fuse(folder, tmp_path / "again"))
    assert torch.equal(again.encode_text(TEXTS), found)
    block = json.loads((folder / "config.json").read_text())["adaptors"]["clip"]
    assert block["options"] == {"model": "demo-clip"} and block["seed"] == 7


def test_seeded_teachers_have_their_seeded_text() -> None:
    torch.manual_seed(7)
    model = open_clip.create_model("demo-clip").eval().requires_grad_(False)
    assert torch.equal(encoder_with().encode_text(TEXTS), expected(model, TEXTS))


def test_the_tower_of_a_teacher_that_was_trained_anew_is_refused() -> None:
    of_then = build_teacher("clip", "clip", {"model": "demo-clip"}, None, 7).fingerprint
    assert encoder_with(fingerprint=of_then).encode_text(TEXTS).shape == (2, 128)
    now = encoder_with(fingerprint=of_then, seed=8)
    with pytest.raises(RadioError, match=rf"'clip' has other weights .*then {of_then[:12]}\)"):
        now.encode_text(TEXTS)


def test_other_weights_can_be_given_and_stay(whole: tuple[nn.Module, Path]) -> None:
    model, path = whole
    encoder = encoder_with(pretrained="/gone/clip.pt")
    with pytest.raises(RadioError, match=r"'/gone/clip\.pt' does not exist.*text_weights="):
        encoder.encode_text(TEXTS)
    found = encoder.encode_text(TEXTS, text_weights=path)
    assert torch.equal(found, expected(model, TEXTS))
    tower = encoder.text_tower("clip")
    assert encoder.text_tower("clip") is tower
    assert torch.equal(encoder.encode_text(TEXTS), found)


def test_a_tower_is_no_part_of_the_encoder() -> None:
    encoder = encoder_with()
    before, keys = encoder.fingerprint, set(encoder.state_dict())
    encoder.text_tower()
    assert set(encoder.state_dict()) == keys
    assert encoder_with().fingerprint == before


def test_zero_shot_through_an_encoder(whole: tuple[nn.Module, Path]) -> None:
    """Columns are open_clip's classifier; the summary, made a unit, picks among them."""
    model, path = whole
    encoder = encoder_with(pretrained=str(path))
    classes, templates = ["cat", "dog", "blue bus"], ["a photo of a {}.", "one {}"]
    weights = zero_shot_weights(encoder.text_tower(), classes, templates)
    tokenizer = open_clip.get_tokenizer("demo-clip")
    judge = open_clip.build_zero_shot_classifier(model, tokenizer, classes, templates)
    assert torch.equal(weights, judge)
    by_encoder = zero_shot_weights(encoder.encode_text, classes, templates)
    assert torch.equal(by_encoder, weights)
    summary = encoder.encode(photographs(4), "clip:summary")["clip:summary"]
    cosines = torch.nn.functional.normalize(summary, dim=1) @ weights
    assert cosines.shape == (4, 3) and cosines.abs().max() <= 1


def test_teachers_without_text_are_refused_with_those_that_have_it() -> None:
    encoder = encoder_with()
    for name in ("parts", "silent", "siglip"):
        with pytest.raises(RadioError, match=rf"'{name}' has no text tower; .*: clip, narrow$"):
            encoder.encode_text(TEXTS, name)
    with pytest.raises(RadioError, match="gives 128 channels but its summary has 12"):
        encoder.encode_text(TEXTS, "narrow")
    with pytest.raises(RadioError, match="expected one text or more"):
        encoder.encode_text([])
    with pytest.raises(RadioError, match="reads open_clip's own tokenizer"):
        encoder.encode_text(TEXTS, tokenizer="x")
    bare = Encoder(replace(small_weights(), teachers={}))
    with pytest.raises(RadioError, match="that have one: none"):
        bare.encode_text(TEXTS)


def test_an_older_folder_loads_and_says_what_it_lacks(tmp_path: Path) -> None:
    folder = write_small(tmp_path / "encoder", teachers=teachers())
    blocks = json.loads((folder / "config.json").read_text())["adaptors"]
    for block in blocks.values():
        block.pop("options", None)
        block.pop("seed", None)
    change_config(folder, {"adaptors": blocks})
    encoder = radio.load(folder)
    assert encoder.encode(photographs(1), "clip:summary")["clip:summary"].shape == (1, 128)
    with pytest.raises(RadioError, match=r"no options\): it was fused before.*`radio fuse RUN"):
        encoder.encode_text(TEXTS)
    blocks["clip"]["options"] = {"model": "demo-clip"}
    del blocks["clip"]["pretrained"]  # NVIDIA's args may not say it
    change_config(folder, {"adaptors": blocks})
    with pytest.raises(RadioError, match=r"which weights .*'clip'.*text_weights="):
        radio.load(folder).encode_text(TEXTS)
