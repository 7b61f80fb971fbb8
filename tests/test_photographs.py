"""The demo's photographs: inside the wheels, split, seeded, credited."""

from __future__ import annotations

import importlib.util
import json
import socket
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image

from radio.data import photographs
from radio.data.decode import decode
from radio.data.photographs import CREDITS, TRAIN, VAL, held_out_pictures, write_photographs
from radio.data.shards import open_images
from radio.errors import RadioError

wheels = pytest.mark.skipif(
    importlib.util.find_spec("skimage") is None or importlib.util.find_spec("sklearn") is None,
    reason="scikit-image and scikit-learn are not installed",
)


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(photographs, "CROPS", {"train": 3, "val": 2})

    def no_network(*args: object) -> None:
        raise AssertionError("something asked for the network")

    monkeypatch.setattr(socket.socket, "connect", no_network)


@wheels
@pytest.mark.usefixtures("few")
def test_the_same_seed_gives_the_same_bytes(tmp_path: Path) -> None:
    first, again, other = (
        write_photographs(tmp_path / name, seed) for name, seed in (("a", 0), ("b", 0), ("c", 1))
    )
    assert {split: path.name for split, path in first.items()} == {
        "train": "train-000000.tar",
        "val": "val-000000.tar",
    }
    assert len(list((tmp_path / "a").iterdir())) == 2
    for split in ("train", "val"):
        assert first[split].read_bytes() == again[split].read_bytes()
        assert first[split].read_bytes() != other[split].read_bytes()
    before = first["val"].read_bytes()
    assert write_photographs(tmp_path / "a")["val"].read_bytes() == before


@wheels
@pytest.mark.usefixtures("few")
def test_the_shards_hold_crops_of_the_right_photographs(tmp_path: Path) -> None:
    paths = write_photographs(tmp_path)
    assert len(open_images(str(paths["train"]))) == 14 * 3
    assert len(open_images(str(paths["val"]))) == 4 * 2
    sources: dict[str, set[str]] = {}
    for split, path in paths.items():
        for sample in webdataset.WebDataset(str(path), shardshuffle=False):
            facts = json.loads(sample["json"])
            sources.setdefault(split, set()).add(facts["source"])
            crop = decode(sample["jpg"])
            left, top, right, bottom = facts["box"]
            whole = photographs.photograph(facts["source"])
            assert 0 <= left < right <= whole.width and 0 <= top < bottom <= whole.height
            assert min(crop.size) <= 288 and crop.width <= right - left  # never enlarged
            area = (right - left) * (bottom - top) / (whole.width * whole.height)
            assert area > 0.24
            small = [
                np.asarray(p.resize((8, 8), Image.Resampling.BOX), dtype=float)
                for p in (crop, whole.crop((left, top, right, bottom)))
            ]
            assert np.abs(small[0] - small[1]).max() < 6
    assert sources == {"train": set(TRAIN), "val": set(VAL)}


@wheels
def test_the_held_out_pictures_are_whole_and_named() -> None:
    pictures = held_out_pictures()
    assert set(pictures) == {"coffee", "flower", "clock_motion", "ihc"}
    assert pictures["coffee"].size == (600, 400)
    assert all(picture.mode == "RGB" for picture in pictures.values())


def test_sides_are_apart_and_the_stereo_pair_is_on_one() -> None:
    assert len(TRAIN) == 14 and len(VAL) == 4
    assert not set(TRAIN) & set(VAL)
    assert {"motorcycle_left.png", "motorcycle_right.png"} <= set(TRAIN)
    table = photographs.credits_table().splitlines()
    assert len(table) == 2 + len(CREDITS)
    assert all(row.count("|") == 7 for row in table)


def test_a_missing_library_names_the_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(photographs.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RadioError, match=r'scikit-image.*pip install "radio-distill\[demo\]"'):
        write_photographs(tmp_path)
    assert list(tmp_path.iterdir()) == []


@wheels
def test_a_library_without_the_picture_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CREDITS, "gone.png", CREDITS["coffee.png"])
    with pytest.raises(RadioError, match=r"this version of scikit-image has no gone\.png"):
        photographs.photograph("gone.png")
