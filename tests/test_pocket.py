"""The teachers that ship with weights: what their folders hold, and that they have learnt."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from radio.data.photographs import photograph
from radio.encoder.images import resized
from teachers import Teacher, build_teacher
from teachers.text import TEXT_KINDS, TextTower, build_text_tower
from teachers.weights import shipped

CONFIGS = Path(__file__).parents[1] / "configs" / "teacher"
SHIPPED = shipped()
MINUTES = 60


def described(name: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
    return found


def built(name: str) -> Teacher:
    config = described(name)
    return build_teacher(config["kind"], name, config["options"], config["pretrained"], 0)


def text_tower(name: str) -> TextTower:
    config = described(name)
    return build_text_tower(config["kind"], name, config["options"], config["pretrained"], 0)


WITH_TEXT = [name for name in SHIPPED if described(name)["kind"] in TEXT_KINDS]


def test_every_shipped_weight_has_a_teacher_of_its_name() -> None:
    for path in CONFIGS.glob("pocket_*.yaml"):
        assert yaml.safe_load(path.read_text())["pretrained"] == path.stem
    assert {"pocket_clip", *SHIPPED} <= {path.stem for path in CONFIGS.glob("pocket_*.yaml")}
    assert "pocket_clip" in SHIPPED


@pytest.mark.parametrize("name", SHIPPED)
def test_the_folder_says_what_the_weights_are(name: str) -> None:
    path = SHIPPED[name]
    assert path.stat().st_size <= 10_000_000
    assert {value.dtype for value in load_file(path).values()} <= {torch.float16, torch.int64}
    card = (path.parent / "README.md").read_text()
    assert hashlib.sha256(path.read_bytes()).hexdigest() in card
    assert "research" in card
    assert described(name)["card"]["weights_licence"] == "research only"
    made = json.loads((path.parent / "training.json").read_text())
    assert made["seed"] is not None
    assert sum(made["minutes"].values()) <= MINUTES
    for curve in made["curves"].values():
        steps = [row["step"] for row in curve]
        assert steps == sorted(steps)
        assert len(steps) > 5


@pytest.mark.parametrize("name", SHIPPED)
def test_a_teacher_is_what_its_file_holds(name: str) -> None:
    teacher = built(name)
    held = {hash_of(value) for value in load_file(SHIPPED[name]).values()}
    for key, value in teacher.state_dict().items():
        assert hash_of(value) in held, key
    assert teacher.fingerprint == built(name).fingerprint


def hash_of(value: torch.Tensor) -> str:
    exact = value.half() if value.is_floating_point() else value
    return hashlib.sha256(exact.contiguous().numpy().tobytes()).hexdigest()


WORDS = {
    "chelsea.png": "a photo of a tabby cat.",
    "coffee.png": "a photo of an espresso.",
    "rocket.jpg": "a photo of a missile.",
}


@pytest.mark.parametrize("name", WITH_TEXT)
def test_words_find_their_photograph(name: str) -> None:
    teacher, tower = built(name), text_tower(name)
    side = teacher.native_size
    pixels = torch.stack([resized(photograph(file), 1, side) for file in WORDS]).float() / 255
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (teacher.mean, teacher.std))
    summary = teacher((pixels - mean) / std).summary
    assert summary is not None
    cosines = torch.nn.functional.normalize(summary, dim=1) @ tower(list(WORDS.values())).T
    assert cosines.argmax(1).tolist() == [0, 1, 2]
    assert cosines.argmax(0).tolist() == [0, 1, 2]


@pytest.mark.parametrize("name", WITH_TEXT)
def test_the_vocabulary_is_small_and_case_means_nothing(name: str) -> None:
    tower = text_tower(name)
    assert tower.vocab <= 8192
    same = tower(["A Photo of a GOLDFISH", "a photo of a goldfish"])
    assert torch.equal(same[0], same[1])
    fish, other, train = tower(["a goldfish", "a fish", "a steam locomotive"])
    assert fish @ other > fish @ train
