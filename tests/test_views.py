"""Decoding, crops and the reader of views."""

from __future__ import annotations

import contextlib
import io
import logging
import pickle
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from picture_zoo import (
    animation,
    colours,
    cut_in_half,
    huge_png,
    jpeg,
    palette_with_transparency,
    png,
    saved,
    sixteen_bit,
    with_orientation,
    write_tar,
)
from PIL import Image, ImageFile, ImageOps
from torchvision.transforms import RandomResizedCrop

from radio.data import decode as decode_module
from radio.data import views as views_module
from radio.data.decode import FORMATS, DamagedImage, decode
from radio.data.plan import ViewSpec, seed_for
from radio.data.shards import ImageSource, open_images
from radio.data.views import ViewReader, centre_square, crop_view, random_crop
from radio.errors import RadioError


def pixels(data: bytes) -> np.ndarray:
    image = decode(data)
    assert image.mode == "RGB"
    return np.asarray(image)


# decoding


def test_colour_pictures_keep_their_pixels() -> None:
    image = colours()
    for kind, options in (("PNG", {}), ("BMP", {}), ("TIFF", {}), ("PPM", {})):
        assert np.array_equal(pixels(saved(image, kind, **options)), np.asarray(image)), kind
    assert np.array_equal(pixels(saved(image, "WEBP", lossless=True)), np.asarray(image))
    large = jpeg(width=640, height=480)  # draft mode would decode it smaller
    assert np.array_equal(pixels(large), np.asarray(Image.open(io.BytesIO(large))))


def test_grey_becomes_three_equal_channels() -> None:
    grey = colours().convert("L")
    expected = np.repeat(np.asarray(grey)[..., None], 3, axis=2)
    assert np.array_equal(pixels(saved(grey)), expected)
    bits = grey.convert("1")
    assert set(np.unique(pixels(saved(bits)))) == {0, 255}


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_sixteen_bits_are_scaled_not_clipped(kind: str) -> None:
    values = np.array([[0, 128, 129, 200, 257], [32896, 40000, 60000, 65534, 65535]])
    data = saved(Image.fromarray(values.astype(np.uint16)), kind)
    assert np.array_equal(pixels(data)[..., 1], np.rint(values / 257).astype(np.uint8))


def test_a_dark_sixteen_bit_picture_stays_dark() -> None:
    assert pixels(sixteen_bit(np.full((4, 4), 255))).max() == 1


def test_cmyk_and_other_colour_spaces_are_converted() -> None:
    image = Image.new("RGB", (16, 16), (200, 40, 90))
    for mode, kind in (("CMYK", "JPEG"), ("CMYK", "TIFF"), ("YCbCr", "TIFF")):
        found = pixels(saved(image.convert(mode), kind)).astype(int)
        assert np.abs(found - (200, 40, 90)).max() <= 3, (mode, kind)


def test_transparent_pixels_lie_on_white() -> None:
    found = pixels(palette_with_transparency())
    assert np.array_equal(found[0, 0], (255, 0, 0))
    assert np.array_equal(found[0, 7], (255, 255, 255))
    half = Image.new("RGBA", (2, 2), (0, 100, 200, 128))
    assert np.abs(pixels(saved(half)).astype(int)[0, 0] - (127, 177, 227)).max() <= 1
    clear = Image.new("LA", (2, 2), (0, 0))
    assert pixels(saved(clear)).min() == 255
    keyed = saved(Image.new("RGB", (2, 2), (9, 8, 7)), transparency=(9, 8, 7))
    assert pixels(keyed).min() == 255


def test_an_animation_gives_its_first_frame_and_one_pixel_is_enough() -> None:
    assert np.array_equal(pixels(animation()), np.full((5, 6, 3), (255, 0, 0)))
    assert pixels(saved(Image.new("RGB", (1, 1), "blue"))).tolist() == [[[0, 0, 255]]]


TURNED = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.rot90(a, 2).transpose(1, 0, 2),
    8: lambda a: np.rot90(a, 1),
    9: lambda a: a,
}


@pytest.mark.parametrize("orientation", list(TURNED))
def test_the_exif_orientation_is_applied(orientation: int) -> None:
    image = colours(7, 5)
    expected = TURNED[orientation](np.asarray(image))
    assert np.array_equal(pixels(with_orientation(image, orientation)), expected)
    again = ImageOps.exif_transpose(decode(with_orientation(image, orientation)))
    assert np.array_equal(np.asarray(again), expected), "turned twice"
    sixteen = Image.fromarray(np.arange(0, 35 * 257, 257, dtype=np.uint16).reshape(5, 7))
    found = pixels(with_orientation(sixteen, orientation))
    assert np.array_equal(found, TURNED[orientation](np.asarray(decode(saved(sixteen)))))


def test_broken_metadata_beside_whole_pixels_is_no_damage() -> None:
    image = colours()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = pixels(saved(image, exif=b"Exif\0\0II*\0\xff\xff\xff\xff"))
    assert np.array_equal(found, np.asarray(image))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "PPM", "JPEG2000"])
def test_a_picture_cut_in_half_is_damage(kind: str) -> None:
    data = saved(colours(200, 150), kind)
    decode(data)
    with pytest.raises(DamagedImage):
        decode(cut_in_half(data))


def test_a_cut_jpeg_is_damage_even_where_another_library_lets_it_pass(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    for options in ({}, {"progressive": True}):
        data = cut_in_half(saved(colours(200, 150), "JPEG", **options))
        with pytest.raises(DamagedImage, match=rf"cannot decode {len(data)} bytes: .*truncated"):
            decode(data)


def test_what_is_no_picture_is_damage() -> None:
    assert issubclass(DamagedImage, RadioError)
    floats = saved(colours().convert("F"), "TIFF")
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"
    cases = (
        (b"", "the file is empty"),
        (b"<html>not found</html>", "22 bytes are no picture of JPEG, PNG"),
        (eps, "are no picture of"),
        (jpeg()[:3], "are no picture of"),
        (floats, "pixels of mode F are not read"),
        (huge_png(0, 10), "cannot|no picture"),
    )
    for data, message in cases:
        with pytest.raises(DamagedImage, match=message) as caught:
            decode(data)
        assert " at 0x" not in str(caught.value)  # equal reasons in every process
    Image.init()
    assert set(FORMATS) <= set(Image.OPEN)


def test_a_huge_picture_is_refused_from_its_header(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("it was decoded"))
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("it was decoded"))
    with pytest.raises(DamagedImage, match="400000000 pixels"):
        decode(huge_png())
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    with pytest.raises(DamagedImage, match="20000 x 20000 px is more than 178956970"):
        decode(huge_png())


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(["JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "PPM"]),
    st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), max_size=6),
    st.integers(0, 10_000),
)
def test_broken_bytes_give_a_picture_or_damage_and_nothing_else(
    kind: str, changes: list[tuple[int, int]], length: int
) -> None:
    data = bytearray(saved(colours(30, 20), kind))
    for place, value in changes:
        data[place % len(data)] = value
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with contextlib.suppress(DamagedImage):
            assert decode(bytes(data[:length])).mode == "RGB"


# crops

SIDES = st.integers(1, 3000)


@given(SIDES, SIDES, st.integers(0, 2**63 - 1), st.floats(0.05, 1.0))
def test_a_crop_lies_inside_and_keeps_the_rule(w: int, h: int, seed: int, low: float) -> None:
    crop = random_crop(w, h, seed, (low, 1.0))
    left, top, right, bottom = crop.box
    assert 0 <= left < right <= w and 0 <= top < bottom <= h
    assert crop == random_crop(w, h, seed, (low, 1.0))
    aspect, slack = (right - left) / (bottom - top), 1.5 / min(right - left, bottom - top)
    if min(w, h) > 1:
        assert 3 / 4 * (1 - slack) <= aspect <= 4 / 3 * (1 + slack)
    if 0.8 < w / h < 1.25 and low < 0.5 and min(w, h) > 30:  # no fallback near the square
        assert (right - left) * (bottom - top) >= w * h * low * (1 - 2 * slack)


RECORDED = [(4, 5, 368, 479), (60, 40, 553, 448), (23, 0, 441, 412)]
RECORDED_FLIPS = [False, False, True, True, False, False, False, False]


def test_crops_are_the_same_everywhere() -> None:
    """Recorded once; a change here changes every run's data."""
    assert [random_crop(640, 480, seed).box for seed in (0, 1, 2**62)] == RECORDED
    assert [random_crop(640, 480, seed).flip for seed in range(8)] == RECORDED_FLIPS


def test_crops_are_distributed_like_torchvisions() -> None:
    image = Image.new("RGB", (640, 400))
    torch.manual_seed(0)
    theirs, ours = [], []
    for seed in range(4000):
        top, left, height, width = RandomResizedCrop.get_params(image, [0.3, 0.9], [3 / 4, 4 / 3])
        theirs.append((width * height, width / height, left, top))
        x0, y0, x1, y1 = random_crop(640, 400, seed, (0.3, 0.9)).box
        ours.append(((x1 - x0) * (y1 - y0), (x1 - x0) / (y1 - y0), x0, y0))
    a, b = np.array(theirs, dtype=np.float64), np.array(ours)
    error = np.sqrt((a.var(axis=0) + b.var(axis=0)) / 4000)
    assert np.all(np.abs(a.mean(axis=0) - b.mean(axis=0)) < 4 * error)
    assert np.all(np.abs(a.std(axis=0) / b.std(axis=0) - 1) < 0.06)
    flips = sum(random_crop(9, 9, seed).flip for seed in range(4000))
    assert abs(flips - 2000) < 4 * 32


def test_long_pictures_get_their_centre() -> None:
    assert random_crop(1000, 10, 3).box == (493, 0, 506, 10)
    assert random_crop(10, 1000, 3).box == (0, 493, 10, 506)
    assert random_crop(1, 1, 3).box == (0, 0, 1, 1)
    assert centre_square(11, 4).box == (3.5, 0, 7.5, 4)


def test_a_view_is_cut_resized_and_mirrored_exactly() -> None:
    image = colours(60, 40)
    array = np.asarray(image)
    box = (7.0, 3.0, 39.0, 35.0)
    same = crop_view(image, views_module.Crop(box, False), 32)
    assert np.array_equal(same.numpy(), array[3:35, 7:39].transpose(2, 0, 1))
    mirrored = crop_view(image, views_module.Crop(box, True), 32)
    assert torch.equal(mirrored, same.flip(2))
    whole = crop_view(image, views_module.Crop((0.0, 0.0, 60.0, 40.0), False), (11, 23))
    judge = np.asarray(image.resize((23, 11), Image.Resampling.BICUBIC))
    assert np.array_equal(whole.numpy(), judge.transpose(2, 0, 1))
    for view in (same, mirrored, whole):
        assert view.dtype == torch.uint8 and view.is_contiguous()
    crop_view(image, views_module.Crop(box, False), 1).fill_(3)  # its memory is its own


def test_one_crop_shows_the_same_at_every_size() -> None:
    ramp = np.linspace(0, 255, 300)[None, :, None] * np.ones((200, 1, 3))
    image = Image.fromarray(ramp.astype(np.uint8))
    crop = random_crop(300, 200, 5)
    small = crop_view(image, crop, 32).float()
    for factor in (2, 4):
        large = crop_view(image, crop, 32 * factor).float()
        pooled = torch.nn.functional.avg_pool2d(large, factor)
        assert (pooled - small).abs().max() <= 2


# the reader


class Listed:
    """A source in memory that counts its reads and fails as told."""

    fingerprint = "0" * 64

    def __init__(self, data: list[bytes], failures: int = 0) -> None:
        self.data = data
        self.failures = failures
        self.reads: Counter[int] = Counter()

    def __len__(self) -> int:
        return len(self.data)

    def key(self, index: int) -> str:
        return f"k{index}"

    def read(self, index: int) -> bytes:
        self.reads[index] += 1
        if self.failures:
            self.failures -= 1
            raise ConnectionResetError("storage went away")
        return self.data[index]


def specs(*samples: int, epoch: int = 0) -> list[ViewSpec]:
    return [ViewSpec(sample, epoch, 100 + at) for at, sample in enumerate(samples)]


def test_views_depend_on_their_spec_alone(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "x.tar", {f"{i}.jpg": jpeg(i) for i in range(6)})
    source: ImageSource = open_images(str(path))
    reader = ViewReader(source, 7, (0.4, 1.0))
    views = reader.batch(specs(3, 0, 5, 3), 24)
    assert views.pixels.shape == (4, 3, 24, 24)
    assert views.pixels.dtype == torch.uint8
    assert views.keys == ("3", "0", "5", "3")
    assert views.replaced == ()
    assert not torch.equal(views.pixels[0], views.pixels[3])  # another position, another crop
    for row, spec in enumerate(specs(3, 0, 5, 3)):
        image = decode(jpeg(spec.sample))
        seed = seed_for(7, "crop", spec.epoch, spec.position)
        expected = crop_view(image, random_crop(*image.size, seed, (0.4, 1.0)), 24)
        assert torch.equal(views.pixels[row], expected)
    other = pickle.loads(pickle.dumps(reader))
    with ThreadPoolExecutor(4) as pool:
        again = list(pool.map(lambda spec: other.batch([spec], 24).pixels, specs(3, 0, 5, 3) * 4))
    assert torch.equal(torch.cat(again), views.pixels.repeat(4, 1, 1, 1))
    elsewhere = [
        ViewReader(source, 8, (0.4, 1.0)).batch(specs(3), 24),
        reader.batch(specs(3, epoch=1), 24),
        ViewReader(source, 7, (0.1, 0.2)).batch(specs(3), 24),
    ]
    assert all(not torch.equal(views.pixels[:1], each.pixels) for each in elsewhere)


def test_a_reader_takes_every_kind_of_picture_at_once() -> None:
    grey = saved(colours().convert("L"))
    cmyk = saved(colours().convert("CMYK"), "JPEG")
    deep = sixteen_bit(np.arange(48 * 40).reshape(40, 48) * 30)
    one = saved(Image.new("RGB", (1, 1), (10, 20, 30)))
    source = Listed([jpeg(), grey, cmyk, deep, palette_with_transparency(), one, animation()])
    views = ViewReader(source, 0, (0.4, 1.0)).batch(specs(*range(7)), (16, 32))
    assert views.pixels.shape == (7, 3, 16, 32)
    assert views.replaced == ()
    assert torch.equal(views.pixels[5], torch.tensor([10, 20, 30])[:, None, None].expand(3, 16, 32))


def test_without_crops_the_centre_square_is_the_view() -> None:
    image = colours(50, 30)
    view = ViewReader(Listed([saved(image)]), 0, None).batch(specs(0), 30).pixels[0]
    assert np.array_equal(view.numpy(), np.asarray(image)[:, 10:40].transpose(2, 0, 1))


def test_a_damaged_picture_is_replaced_by_its_keyed_redraw_and_nothing_else_moves(
    caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    whole = [jpeg(i) for i in range(9)]
    broken = [cut_in_half(data) if i in (2, 4) else data for i, data in enumerate(whole)]
    path = write_tar(tmp_path / "x.tar", {f"{i}.jpg": data for i, data in enumerate(broken)})
    reader = ViewReader(open_images(str(path)), 3, (0.4, 1.0))
    wanted = specs(1, 2, 8, 4, 2, 0)
    with caplog.at_level(logging.WARNING, "radio.data"):
        views = reader.batch(wanted, 20)
        again = reader.batch(wanted, 20)
    reference = ViewReader(Listed(whole), 3, (0.4, 1.0)).batch(wanted, 20)
    for row, spec in enumerate(wanted):
        sample, redraw = spec.sample, 0
        while sample in (2, 4):
            redraw += 1
            sample = seed_for(3, "redraw", spec.epoch, spec.position, redraw) % 9
        assert views.keys[row] == str(sample)
        if not redraw:
            assert torch.equal(views.pixels[row], reference.pixels[row])
    assert torch.equal(views.pixels, again.pixels)
    assert views.replaced == again.replaced
    assert {key for key, _ in views.replaced} == {"2", "4"} == set(reader.damaged)
    assert len(views.replaced) >= 3
    assert "truncated" in reader.damaged["2"].lower()
    warned = [record.getMessage() for record in caplog.records]
    assert len(warned) == 2  # once per key
    assert "'2'" in warned[0] and "x.tar at byte" in warned[0] and "cannot decode" in warned[0]
    assert pickle.loads(pickle.dumps(reader)).damaged == reader.damaged


def test_nothing_but_damage_ends_with_the_keys() -> None:
    reader = ViewReader(Listed([b"no picture"] * 3), 0, (0.4, 1.0))
    with pytest.raises(RadioError, match=r"'k1' and its 20 redraws are all damaged \(k1, k"):
        reader.batch(specs(1), 8)


def test_a_failing_storage_is_tried_three_times_and_never_taken_for_damage(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(views_module.time, "sleep", pauses.append)
    source = Listed([jpeg()], failures=2)
    reader = ViewReader(source, 0, (0.4, 1.0))
    with caplog.at_level(logging.WARNING, "radio.data"):
        views = reader.batch(specs(0), 8)
    assert views.keys == ("k0",) and views.replaced == () and reader.damaged == {}
    assert source.reads[0] == 3
    assert pauses == [0.2, 0.4]
    assert "reading 'k0' failed (storage went away)" in caplog.text
    reader = ViewReader(Listed([jpeg()], failures=3), 0, (0.4, 1.0))
    with pytest.raises(ConnectionResetError, match="storage went away"):
        reader.batch(specs(0), 8)
    assert reader.damaged == {}


def test_pictures_are_decoded_once_for_several_sizes_within_a_bound(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source = Listed([png(i, 100, 100) for i in range(4)])
    reader = ViewReader(source, 0, (0.4, 1.0))
    for size in (8, 16, 32):
        reader.batch(specs(0, 1, 2, 3), size)
    assert set(source.reads.values()) == {1}
    assert len(pickle.dumps(reader)) < len(pickle.dumps(source)) + 1000
    monkeypatch.setattr(views_module, "CACHE_BYTES", 3 * 40_000)
    source.reads.clear()
    small = ViewReader(source, 0, (0.4, 1.0))
    for sample in (0, 1, 2, 0, 3, 0, 1):  # 3 drives out 1, the one not used for longest
        small.batch(specs(sample), 8)
        assert small._cache.num_bytes == len(small._cache) * 40_000 <= 3 * 40_000
    assert source.reads == {0: 1, 1: 2, 2: 1, 3: 1}
    monkeypatch.setattr(views_module, "CACHE_BYTES", 39_999)
    none = ViewReader(source, 0, (0.4, 1.0))
    none.batch(specs(0, 0), 8)
    assert len(none._cache) == none._cache.num_bytes == 0


def test_known_damage_is_not_read_again() -> None:
    source = Listed([b"junk", jpeg(1)])
    reader = ViewReader(source, 0, (0.4, 1.0))
    for _ in range(3):
        reader.batch(specs(0), 8)
    assert source.reads[0] == 1
    assert decode_module.MAX_PIXELS == 178_956_970
