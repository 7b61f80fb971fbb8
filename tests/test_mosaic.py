"""Views on canvases, against a NumPy oracle that places every pixel by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from radio.data.mosaic import Mosaic


@st.composite
def mosaics(draw: st.DrawFn) -> tuple[Mosaic, int]:
    """A mosaic that fits, and a number of views."""
    stride = draw(st.integers(1, 7))
    canvas = draw(st.integers(1, 12))
    view = draw(st.integers(1, canvas))
    return Mosaic(canvas * stride, view * stride, stride), draw(st.integers(1, 9))


def oracle_place(views: np.ndarray, canvas_px: int, stride: int) -> np.ndarray:
    """Lineage's rule: g = (canvas/d)//(view/d) tiles a side, whole strides apart."""
    count, channels, view_px, _ = views.shape
    grid, window = canvas_px // stride, view_px // stride
    tiles = grid // window
    pitch = grid // tiles
    canvases = np.zeros((-(-count // tiles**2), channels, canvas_px, canvas_px))
    for index in range(count):
        canvas, tile = index // tiles**2, index % tiles**2
        for y in range(view_px):
            for x in range(view_px):
                row = tile // tiles * pitch * stride + y
                column = tile % tiles * pitch * stride + x
                canvases[canvas, :, row, column] = views[index, :, y, x]
    return canvases


@settings(max_examples=60, deadline=None)
@given(mosaics(), st.integers(0, 2**31))
def test_placing_equals_the_oracle_and_nothing_overlaps(
    case: tuple[Mosaic, int], seed: int
) -> None:
    mosaic, count = case
    views = np.random.default_rng(seed).normal(size=(count, 3, mosaic.view_px, mosaic.view_px))
    placed = mosaic.place(torch.from_numpy(views))
    expected = oracle_place(views, mosaic.canvas_px, mosaic.stride)
    assert placed.dtype == torch.float64
    assert np.array_equal(placed.numpy(), expected)
    assert len(placed) == mosaic.num_canvases(count)
    assert mosaic.views_per_canvas == (mosaic.canvas_px // mosaic.view_px) ** 2
    assert np.isclose((placed**2).sum(), (views**2).sum())  # all there, once


@settings(max_examples=100, deadline=None)
@given(mosaics(), st.integers(0, 2**31))
def test_each_view_gets_the_features_of_its_own_pixels(case: tuple[Mosaic, int], seed: int) -> None:
    """An average pool by the stride sees no context: mosaic and single view must agree."""
    mosaic, count = case
    generator = torch.Generator().manual_seed(seed)
    # Whole numbers, so that sums are exact in any order.
    views = torch.randint(-8, 9, (count, 3, mosaic.view_px, mosaic.view_px), generator=generator)
    pool = torch.nn.AvgPool2d(mosaic.stride, divisor_override=1)
    features = pool(mosaic.place(views.float()))
    side = mosaic.view_px // mosaic.stride
    split = mosaic.split(features, count)
    assert split.shape == (count, 3, side, side)
    assert torch.equal(split, pool(views.float()))


def test_radios_own_example() -> None:
    """432 px on SAM's 1024: 2 x 2 with 80 px of padding per tile (RADIOv2.5)."""
    mosaic = Mosaic(1024, 432, 16)
    assert (mosaic.per_side, mosaic.views_per_canvas, mosaic.pitch) == (2, 4, 512)
    assert mosaic.pitch - mosaic.view_px == 80
    assert mosaic.corner(7) == (1, 512, 512)
    odd = Mosaic(1024, 304, 16)  # 3 a side: 1024 / 3 is no whole stride, 336 is
    assert (odd.per_side, odd.pitch) == (3, 336)


def test_a_partial_last_canvas_is_zero_where_no_view_lies() -> None:
    mosaic = Mosaic(32, 16, 8)
    canvases = mosaic.place(torch.ones(5, 3, 16, 16))
    assert canvases.shape == (2, 3, 32, 32)
    assert canvases[0].min() == 1
    assert canvases[1, :, :16, :16].min() == 1
    assert canvases[1].sum() == 3 * 16 * 16
    assert mosaic.split(torch.ones(2, 4, 4, 4), 5).shape == (5, 4, 2, 2)
    assert mosaic.place(torch.ones(0, 3, 16, 16)).shape == (0, 3, 32, 32)
    assert mosaic.split(torch.ones(0, 4, 4, 4), 0).shape == (0, 4, 2, 2)


def test_split_copies_so_that_canvases_can_be_freed() -> None:
    mosaic = Mosaic(32, 16, 8)
    features = torch.zeros(1, 2, 4, 4)
    split = mosaic.split(features, 4)
    features += 1
    assert split.sum() == 0


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((1024, 100, 16), "views of 100 px do not fit .* nearest that do: 96, 112"),
        ((1024, 1040, 16), "views of 1040 px .* nearest that do: 1024$"),
        ((1024, 0, 16), "views of 0 px .* nearest that do: 16$"),
        ((1024, -5, 16), "nearest that do: 16$"),
        ((1024, 3, 16), "nearest that do: 16$"),
        ((1024, 1023, 16), "nearest that do: 1008, 1024$"),
        ((1000, 500, 16), "canvas of 1000 px is no multiple .* nearest that are: 992, 1008"),
        ((8, 8, 16), "canvas of 8 px .* nearest that are: 16$"),
        ((64, 32, 0), "the stride is 0 px"),
    ],
)
def test_sizes_that_do_not_fit_are_refused_with_the_nearest_that_do(
    sizes: tuple[int, int, int], message: str
) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        Mosaic(*sizes)
    canvas, _, stride = sizes
    for nearest in str(caught.value).rpartition(": ")[2].split(", "):
        if nearest.isdigit() and "canvas of" in str(caught.value)[:12]:
            Mosaic(int(nearest), stride, stride)
        elif nearest.isdigit():
            Mosaic(canvas, int(nearest), stride)


def test_other_shapes_than_promised_are_refused() -> None:
    mosaic = Mosaic(32, 16, 8)
    with pytest.raises(ValueError, match="views are 8 px, this mosaic takes 16 px"):
        mosaic.place(torch.zeros(1, 3, 8, 8))
    with pytest.raises(ValueError, match=r"grid \(2, 4\), a canvas of 32 px has \(4, 4\)"):
        mosaic.split(torch.zeros(1, 5, 2, 4), 4)
    for count in (4, 9):
        with pytest.raises(ValueError, match=rf"{count} views lie on {-(-count // 4)} canvases"):
            mosaic.split(torch.zeros(2, 5, 4, 4), count)
