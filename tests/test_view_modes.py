"""View modes: every one against views shown one by one, and what each must never do."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from test_distill import losses_of
from tiny import fake_teacher, tiny_config

from radio import checks as configuration
from radio.config import Config, check
from radio.data.configured import training_plan
from radio.data.plan import PartitionSpec
from radio.errors import RadioError
from radio.targets import grid
from radio.targets.codec import decode
from radio.targets.stream import LocalStream
from radio.targets.target_maker import Request, TargetMaker
from radio.targets.view_modes import VIEW_MODES
from radio.training.distill import distill

pytestmark = pytest.mark.usefixtures("no_report")
REQUEST = Request("train", "float32", {})


@pytest.fixture(scope="module")
def stream(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalStream]:
    with LocalStream(tiny_config(tmp_path_factory.mktemp("modes"))) as stream:
        yield stream


def partition(stream: LocalStream, mode: str, image_size: int = 32) -> PartitionSpec:
    low = training_plan(stream.config, 24)(0).partitions[0]
    return replace(low, image_size=image_size, modes={"edges": mode})


def features(maker: TargetMaker, part: PartitionSpec) -> torch.Tensor:
    return decode(maker(part, REQUEST).features, "float32")


def one(part: PartitionSpec, number: int) -> PartitionSpec:
    return replace(part, views=part.views[number : number + 1], order=(0,))


def normalised(maker: TargetMaker, part: PartitionSpec, side: int) -> torch.Tensor:
    pixels = maker.readers["train"].batch(part.views, side).pixels.float() / 255
    return (pixels - torch.tensor(maker.teacher.mean).view(3, 1, 1)) / torch.tensor(
        maker.teacher.std
    ).view(3, 1, 1)


def test_the_configuration_knows_every_mode_and_grid() -> None:
    assert tuple(VIEW_MODES) == configuration.VIEW_MODES
    assert tuple(grid.GRIDS) == configuration.GRIDS


@pytest.mark.parametrize("mode", [mode for mode in VIEW_MODES if mode != "mosaic"])
def test_a_view_does_not_depend_on_its_neighbours(stream: LocalStream, mode: str) -> None:
    maker, part = stream.makers["edges"], partition(stream, mode)
    together = features(maker, part)
    assert len(together) == len(part.views) == 5
    for number in range(5):
        alone = features(maker, one(part, number))[0]
        torch.testing.assert_close(together[number], alone, rtol=1e-5, atol=1e-6)


def test_a_padded_view_lies_alone_on_its_canvas(stream: LocalStream) -> None:
    maker, part = stream.makers["edges"], partition(stream, "padded")
    canvas = torch.zeros(5, 3, 64, 64)
    canvas[:, :, :32, :32] = normalised(maker, part, 32)
    expected = maker.teacher(canvas).features[:, :, :2, :2]
    torch.testing.assert_close(features(maker, part), expected, rtol=1e-5, atol=1e-6)


def test_tiles_are_native_pictures_laid_side_by_side(stream: LocalStream) -> None:
    """96 px of student, 64 px of teacher: 2 x 2 tiles of a view of 128 px."""
    maker, part = stream.makers["edges"], partition(stream, "tiled", image_size=96)
    pixels = normalised(maker, part, 128)
    whole = torch.empty(5, 10, 8, 8)
    for row in range(2):
        for column in range(2):
            rows, columns = (slice(64 * at, 64 * at + 64) for at in (row, column))
            tile = maker.teacher(pixels[:, :, rows, columns]).features
            whole[:, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4] = tile
    expected = F.interpolate(whole, size=(6, 6), mode="bilinear", antialias=True)
    torch.testing.assert_close(features(maker, part), expected, rtol=1e-5, atol=1e-6)
    assert maker(part, REQUEST).summary is None


def test_sharpened_features_reach_the_students_grid(stream: LocalStream) -> None:
    maker, part = stream.makers["words"], partition(stream, "sharpened", image_size=64)
    part = replace(part, modes={"words": "sharpened"})
    native = maker.teacher(normalised(maker, part, 64)).features
    assert native.shape[-1] == 2, "the teacher has fewer positions than the student's 4"
    expected = F.interpolate(native, size=(4, 4), mode="bicubic")
    torch.testing.assert_close(features(maker, part), expected, rtol=1e-5, atol=1e-6)
    assert maker(part, REQUEST).summary is not None


def test_the_order_on_canvases_decides_the_neighbours_and_nothing_else(
    stream: LocalStream,
) -> None:
    """With the neighbours' pixels removed, a view's features are its own wherever it lies."""
    maker, part = stream.makers["edges"], partition(stream, "mosaic")
    assert sorted(part.order) == [0, 1, 2, 3, 4] and part.order != (0, 1, 2, 3, 4)
    drawn, raster = features(maker, part), features(maker, replace(part, order=tuple(range(5))))
    assert not torch.allclose(drawn, raster), "another canvas is another context"
    views = normalised(maker, part, 32)
    canvas = torch.zeros(1, 3, 64, 64)
    for place, number in enumerate(part.order[:4]):
        top, left = 32 * (place // 2), 32 * (place % 2)
        canvas[0, :, top : top + 32, left : left + 32] = views[number]
    whole = maker.teacher(canvas).features[0]
    for place, number in enumerate(part.order[:4]):
        top, left = 2 * (place // 2), 2 * (place % 2)
        window = whole[:, top : top + 2, left : left + 2]
        torch.testing.assert_close(drawn[number], window, rtol=1e-5, atol=1e-6)


def test_a_mosaic_teacher_of_another_stride_sees_views_on_the_students_grid(tmp_path: Path) -> None:
    """SAM3 (stride 14) beside a student in patches of 16: 32 px are 2 x 2 patches, so 28 px."""
    config = tiny_config(tmp_path)
    config.teachers["edges"] = fake_teacher(None, 10, stride=14, native_size=56)
    config.teachers["edges"].summary_weight = 0.0
    with LocalStream(config) as stream:
        maker, part = stream.makers["edges"], partition(stream, "mosaic")
        found, views = features(maker, part), normalised(maker, part, 28)
        canvas = torch.zeros(1, 3, 56, 56)
        for place, number in enumerate(part.order[:4]):
            top, left = 28 * (place // 2), 28 * (place % 2)
            canvas[0, :, top : top + 28, left : left + 28] = views[number]
        whole = maker.teacher(canvas).features[0]
    for place, number in enumerate(part.order[:4]):
        top, left = 2 * (place // 2), 2 * (place % 2)
        window = whole[:, top : top + 2, left : left + 2]
        torch.testing.assert_close(found[number], window, rtol=1e-5, atol=1e-6)


def test_the_larger_grid_is_am_radios(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, steps=2)
    config.losses.grid = "larger"
    with LocalStream(config) as stream:
        part = training_plan(config, 24)(0).partitions[1]  # 4 x 4 patches of the student
        found = {name: features(maker, part).shape[-1] for name, maker in stream.makers.items()}
        assert found == {"words": 4, "parts": 4, "edges": 4}, "words has 2 x 2 of its own"
    other = tiny_config(tmp_path / "coarser", steps=2)
    assert losses_of(distill(config).out) != losses_of(distill(other).out)


def with_mode(config: Config, teacher: str, mode: str) -> Config:
    config.stages[0].partitions["low"].views[teacher] = mode
    return config


def test_every_mode_trains(tmp_path: Path) -> None:
    for mode in VIEW_MODES:
        config = with_mode(tiny_config(tmp_path / mode, steps=1), "edges", mode)
        check(config)
        assert distill(config).step == 1


def test_a_mode_that_a_teacher_does_not_offer_names_those_it_does(tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    config.teachers["words"].card.view_modes = ["native"]
    with pytest.raises(RadioError, match=r"'padded'.*offers: native, tiled, sharpened"):
        check(with_mode(config, "words", "padded"))
