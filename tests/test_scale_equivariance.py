"""Task equivariance: what follows the picture scores 0, against loops written out and Pillow."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from test_zero_shot import CLIP, encoder, write_data

from radio.config import load_teacher
from radio.encoder.weights import TeacherHeads
from radio.errors import RadioError
from radio.evaluation.equivariance import Cropped, Tiled, equivariance, errors
from radio.evaluation.pictures import Pictures
from radio.evaluation.result import Options, Result
from radio.evaluation.target import Target
from radio.evaluation.target_kinds import PixelsTarget, TeacherTarget

PATCH = 8


class Colours(Target):
    """The mean colour of each patch, the whole picture's beside it, and a fixed pattern on it."""

    def __init__(
        self, context: float = 0.0, pattern: float = 0.0, takes_any_size: bool = True
    ) -> None:
        self.context, self.pattern = context, pattern
        name = f"colours {context} {pattern}"
        size: dict[str, Any] = {"native_size": 64, "patch": PATCH, "takes_any_size": takes_any_size}
        super().__init__(name, name, ("summary", "features"), **size)

    def extract(self, images: torch.Tensor, names: Sequence[str]) -> dict[str, torch.Tensor]:
        pixels = images.float() / 255
        cells = F.avg_pool2d(pixels, PATCH)
        mean = pixels.mean((2, 3), keepdim=True).expand_as(cells)
        if self.context:
            cells = torch.cat([cells, self.context * mean], dim=1)
        if self.pattern:
            generator = torch.Generator().manual_seed(0)
            cells = cells + self.pattern * torch.rand(cells.shape[1:], generator=generator)
        return {"features": cells}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, _two_threads: None) -> None:
    monkeypatch.setenv("RADIO_CACHE", str(tmp_path / "cache"))
    torch.set_num_threads(1)


@pytest.fixture
def data(tmp_path: Path) -> Pictures:
    return write_data(tmp_path / "data", [{} for _ in range(6)])


def rows_of(result: Result) -> dict[tuple[Any, ...], dict[str, Any]]:
    keys = ("kind", "from", "to", "size", "patches")
    return {tuple(row[key] for key in keys if key in row): row for row in result.details["rows"]}


def test_colours_follow_shifts_and_tiles_exactly_and_sizes_nearly(data: Pictures) -> None:
    result = equivariance(Colours(), data, Options())
    rows = rows_of(result)
    assert set(rows) == {
        ("scale", 64, 32),
        ("shift", 64, 1),
        ("shift", 64, 2),
        ("tiles", 64),
        ("tiled_scale", 64, 32),
    }
    for key in (("shift", 64, 1), ("shift", 64, 2), ("tiles", 64)):
        assert abs(rows[key]["centred"]) < 1e-6 and abs(rows[key]["raw"]) < 1e-6
    assert 0 < rows["scale", 64, 32]["centred"] < 0.1  # two ways of shrinking
    assert rows["scale", 64, 32]["centred"] == pytest.approx(rows["tiled_scale", 64, 32]["centred"])
    scored = [row["centred"] for row in rows.values() if row["in_score"]]
    assert len(scored) == 3 and result.score == pytest.approx(np.mean(scored))
    assert result.samples.shape == (6,) and result.samples.mean() == pytest.approx(result.score)
    json.dumps(result.as_dict())


def test_context_is_lost_by_tiling(data: Pictures) -> None:
    rows = rows_of(equivariance(Colours(context=1.0), data, Options()))
    assert rows["tiles", 64]["centred"] > 0.02
    assert rows["tiled_scale", 64, 32]["centred"] > 2 * rows["scale", 64, 32]["centred"]


def test_a_fixed_pattern_does_not_follow_shifts(data: Pictures) -> None:
    weak, strong = (
        rows_of(equivariance(Colours(pattern=strength), data, Options(sizes=(64,))))
        for strength in (0.1, 0.5)
    )
    for patches in (1, 2):
        assert (
            strong["shift", 64, patches]["centred"] > weak["shift", 64, patches]["centred"] > 0.01
        )
    row = strong["shift", 64, 1]
    assert row["raw"] < row["centred"]  # what all positions share hides it


def test_positions_move_by_the_same_everywhere_which_centring_takes_off(data: Pictures) -> None:
    rows = rows_of(equivariance(PixelsTarget(), data, Options(sizes=(64, 48, 32))))
    assert ("scale", 64, 48) in rows and ("scale", 64, 32) in rows
    assert abs(rows["shift", 64, 2]["centred"]) < 1e-6 < rows["shift", 64, 2]["raw"]


def test_sizes_that_are_no_double_of_the_smallest(data: Pictures) -> None:
    rows = rows_of(equivariance(Colours(), data, Options(sizes=(80, 56, 40))))
    assert {("scale", 80, 56), ("scale", 80, 40), ("tiles", 80), ("shift", 80, 2)} < set(rows)
    rows = rows_of(equivariance(Colours(), data, Options(sizes=(40,))))
    assert set(rows) == {
        ("shift", 40, 1),
        ("shift", 40, 2),
        ("tiles", 80),
        ("tiled_scale", 80, 40),
    }


def oracle(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Return 1 - cos of [n, d, h, w], averaged over positions, position by position."""
    found = np.zeros(len(first))
    for n in range(len(first)):
        columns = [
            1 - (a @ b) / np.sqrt((a @ a) * (b @ b))
            for a, b in zip(first[n].reshape(5, -1).T, second[n].reshape(5, -1).T, strict=True)
        ]
        found[n] = np.mean(columns)
    return found


def test_errors_are_those_of_a_loop_with_pillow_s_resize() -> None:
    from radio.evaluation.equivariance import _smaller

    generator = torch.Generator().manual_seed(0)
    large = torch.randn(20, 5, 9, 9, generator=generator) + 3
    small = torch.randn(20, 5, 6, 6, generator=generator) + 3
    raw, centred = errors(large, small, _smaller)
    shrunk = np.empty((20, 5, 6, 6))
    for n, c in np.ndindex(20, 5):
        channel = Image.fromarray(large[n, c].numpy(), mode="F")
        shrunk[n, c] = np.asarray(channel.resize((6, 6), Image.Resampling.BILINEAR))
    other = small.double().numpy()
    assert raw == pytest.approx(oracle(shrunk, other), abs=1e-5)
    shrunk -= shrunk.mean((0, 2, 3), keepdims=True)
    other -= other.mean((0, 2, 3), keepdims=True)
    assert centred == pytest.approx(oracle(shrunk, other), abs=1e-5)
    assert errors(small, 3 * small, _smaller)[1] == pytest.approx(np.zeros(20), abs=1e-12)


def test_views_of_a_target_have_their_own_fingerprints_and_maps() -> None:
    target = Colours()
    views = [
        Cropped(target, 64, 0),
        Cropped(target, 64, 1),
        Cropped(target, 48, 0),
        Tiled(target, 32),
    ]
    prints = {view.fingerprint for view in views}
    assert len(prints | {target.fingerprint}) == 5
    images = torch.randint(0, 256, (2, 3, 80, 80), dtype=torch.uint8)
    whole = target.extract(images, ("features",))["features"]
    moved = views[1].extract(images, ("features",))["features"]
    assert torch.equal(moved, whole[:, :, 1:9, 1:9])
    tiled = Tiled(target, 40).extract(images, ("features",))["features"]
    assert torch.equal(tiled, whole)


def test_a_target_of_one_size_is_shifted_and_tiled_but_not_resized(data: Pictures) -> None:
    fixed = Colours(takes_any_size=False)
    with pytest.raises(RadioError, match=r"takes only its native 64 px.*--sizes 64 measures"):
        equivariance(fixed, data, Options())
    rows = rows_of(equivariance(fixed, data, Options(sizes=(64,))))
    assert set(rows) == {("shift", 64, 1), ("shift", 64, 2), ("tiled_scale", 128, 64)}


def test_a_real_teacher_and_an_adaptor(data: Pictures) -> None:
    from small_encoder import head

    clip = TeacherTarget("demo_clip", load_teacher("demo_clip"))
    with pytest.raises(RadioError, match="takes only its native 128 px"):
        equivariance(clip, data, Options(sizes=(128, 64)))
    student = encoder(clip=TeacherHeads(None, {"features": head(96, 12)}, facts=CLIP))
    result = equivariance(student, data, Options(adaptor="clip"))
    assert result.details["features"] == "clip:features" and 0 < result.score < 2
    assert equivariance(student, data, Options(adaptor="clip")).score == result.score


def test_what_cannot_be_compared_is_refused(data: Pictures) -> None:
    with pytest.raises(RadioError, match="'summary' is no map"):
        equivariance(Colours(), data, Options(features="summary"))
    with pytest.raises(RadioError, match="has no output 'sam:features'; it has: summary, features"):
        equivariance(Colours(), data, Options(adaptor="sam"))
    with pytest.raises(RadioError, match="24 px are fewer than 4 patches of 8 px"):
        equivariance(Colours(), data, Options(sizes=(24, 16)))
    with pytest.raises(RadioError, match="60 px is no multiple of the 8 px"):
        equivariance(Colours(), data, Options(sizes=(60, 32)))
