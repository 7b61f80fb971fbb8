"""The teachers that ship with weights: what their folders hold, and that they have learnt."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from radio.data.photographs import photograph
from radio.encoder.images import resized
from teachers import Teacher, build_teacher
from teachers.pocket.recipes.store import SHARED, cost
from teachers.sam import build_mask_decoder
from teachers.text import TEXT_KINDS, TextTower, build_text_tower
from teachers.weights import shipped

CONFIGS = Path(__file__).parents[1] / "configs" / "teacher"
SHIPPED = shipped()
CPU_MINUTES = 120  # of a teacher's own parts, and of all shared ones: an hour on two cores


def described(name: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
    return found


def built(name: str) -> Teacher:
    config = described(name)
    return build_teacher(config["kind"], name, config["options"], config["pretrained"], 0)


def text_tower(name: str) -> TextTower:
    config = described(name)
    return build_text_tower(config["kind"], name, config["options"], config["pretrained"], 0)


def normalised(teacher: Teacher, pixels: torch.Tensor) -> torch.Tensor:
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (teacher.mean, teacher.std))
    return (pixels - mean) / std


WITH_TEXT = [name for name in SHIPPED if described(name)["kind"] in TEXT_KINDS]


def test_every_pocket_teacher_ships_under_its_own_name() -> None:
    configs = {path.stem for path in CONFIGS.glob("pocket_*.yaml")}
    assert set(SHIPPED) == configs
    assert all(described(name)["pretrained"] == name for name in configs)


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
    for curve in made["curves"].values():
        steps = [row["step"] for row in curve]
        assert steps == sorted(steps)
        assert len(steps) > 5


def test_each_costs_at_most_an_hour_on_two_cores_beside_what_they_share() -> None:
    """What several start from is made once, and is the same however often it is told."""
    told = [
        json.loads((path.parent / "training.json").read_text())["cpu_minutes"]
        for path in SHIPPED.values()
    ]
    teachers_with = Counter(part for parts in told for part in parts)
    assert {part for part, count in teachers_with.items() if count > 1} == set(SHARED)
    for parts in told:
        own = [spent for part, spent in parts.items() if part not in SHARED]
        assert 0 < sum(own) <= CPU_MINUTES
    shared = sum(max(parts.get(part, 0.0) for parts in told) for part in SHARED)
    assert 0 < shared <= CPU_MINUTES


@pytest.mark.parametrize("name", SHIPPED)
def test_the_card_says_what_it_cost(name: str) -> None:
    folder = SHIPPED[name].parent
    made = json.loads((folder / "training.json").read_text())
    assert (
        f"**Cost.** {cost(made['cpu_minutes'], made['curves'])}"
        in (folder / "README.md").read_text()
    )


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
    summary = teacher(normalised(teacher, pixels)).summary
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


PHOTOGRAPHS = ["chelsea.png", "coffee.png", "rocket.jpg", "astronaut.png", "china.jpg", "brick.png"]


@torch.no_grad()
def found_again(teacher: Teacher) -> int:
    """Count how often a corner of a photograph and the mirrored, grey opposite corner meet."""
    whole = torch.stack([resized(photograph(file), 1, 256) for file in PHOTOGRAPHS]).float() / 255
    grey = whole[:, :, 64:, 64:].flip(-1).mean(1, keepdim=True).expand(-1, 3, -1, -1)
    summaries = []
    for part in (whole[:, :, :192, :192], grey):
        small = torch.nn.functional.interpolate(part, (128, 128), mode="area")
        summary = teacher(normalised(teacher, small)).summary
        assert summary is not None
        summaries.append(torch.nn.functional.normalize(summary, dim=1))
    cosines, own = summaries[0] @ summaries[1].T, torch.arange(len(PHOTOGRAPHS))
    return int((cosines.argmax(0) == own).sum() + (cosines.argmax(1) == own).sum())


def test_dinov2_knows_a_photograph_again() -> None:
    config = described("pocket_dinov2")
    unlearnt = build_teacher(config["kind"], "unlearnt", config["options"], None, 0)
    found = found_again(built("pocket_dinov2"))
    assert found > found_again(unlearnt)
    assert found >= 8  # of 12; by chance 2


@torch.no_grad()
def overlap_with_discs(pretrained: str | None, prompt: str) -> float:
    """Return the mean IoU of the chosen mask with a disc that is put on a photograph."""
    config = described("pocket_sam")
    kind, options = config["kind"], config["options"]
    teacher = build_teacher(kind, "sam", options, pretrained, 0)
    decoder = build_mask_decoder(kind, "sam", options, pretrained, 0)
    rows, columns = torch.meshgrid(torch.arange(256), torch.arange(256), indexing="ij")
    overlaps = []
    for file, (x, y) in zip(PHOTOGRAPHS, [(80, 80), (170, 90), (90, 170)] * 2, strict=True):
        disc = (columns - x).square() + (rows - y).square() <= 48**2
        pixels = resized(photograph(file), 1, 256).float() / 255
        pixels = torch.where(disc, torch.tensor([0.9, 0.2, 0.2]).view(3, 1, 1), pixels)
        features = teacher(normalised(teacher, pixels[None])).features
        points = torch.tensor([[x, y]]).float() if prompt == "point" else None
        corners = [[x - 48, y - 48, x + 48, y + 48]]
        boxes = torch.tensor(corners).float() if prompt == "box" else None
        logits, quality = decoder(features, points, None, boxes, 256)
        chosen = logits[:, int(quality.argmax())]
        mask = torch.nn.functional.interpolate(chosen[None], (256, 256), mode="bilinear")[0, 0] > 0
        overlaps.append(float((mask & disc).sum() / (mask | disc).sum()))
    return sum(overlaps) / len(overlaps)


@pytest.mark.parametrize("prompt", ["point", "box"])
def test_sam_finds_a_disc_on_photographs(prompt: str) -> None:
    assert overlap_with_discs(None, prompt) < 0.3
    assert overlap_with_discs("pocket_sam", prompt) > {"point": 0.4, "box": 0.75}[prompt]
