"""Encoder.encode: what goes in, what comes out, what is refused."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from picture_zoo import colours, cut_in_half, jpeg, png, sixteen_bit, with_orientation
from PIL import Image
from small_encoder import photographs, small_weights, write_small
from test_student import rms_error

import radio
from radio.data.decode import DamagedImage
from radio.encoder.card import model_card
from radio.encoder.encoder import Encoder
from radio.encoder.folder import read_weights, write_folder
from radio.errors import RadioError
from student.positions import eval_positions


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)  # the models are too small for two


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small(tmp_path_factory.mktemp("small") / "encoder")


@pytest.fixture(scope="module")
def encoder(small: Path) -> Encoder:
    return radio.load(small)


# what encode is given


def test_the_same_pixels_give_the_same_features_in_every_form(
    encoder: Encoder, tmp_path: Path
) -> None:
    picture = colours(48, 64)
    picture.save(tmp_path / "p.png")
    pixels = photographs(1)
    names = encoder.feature_names
    expected = encoder.encode(pixels, names)
    forms: list[Any] = [
        pixels[0],
        pixels.float() / 255,
        pixels[0].double() / 255,
        picture,
        tmp_path / "p.png",
        str(tmp_path / "p.png"),
        [picture],
        (pixels[0],),
    ]
    for form in forms:
        found = encoder.encode(form, names)
        assert list(found) == list(names)
        for name in names:
            assert torch.equal(found[name], expected[name]), (name, type(form))
    assert expected["words:summary"].shape == (1, 12)
    assert expected["edges:features"].shape == (1, 12, 10)


def test_kinds_may_be_mixed_in_one_list(encoder: Encoder, tmp_path: Path) -> None:
    pixels = photographs(3)
    (tmp_path / "p.png").write_bytes(png(2, 48, 64))
    mixed = [pixels[0], pixels[1].float() / 255, tmp_path / "p.png"]
    found = encoder.encode(mixed)["features"]
    torch.testing.assert_close(found, encoder.encode(pixels)["features"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("batch", [1, 2, 5, 64])
def test_the_batch_does_not_matter(encoder: Encoder, batch: int) -> None:
    pixels = photographs(5)
    expected = encoder.encode(pixels)
    found = encoder.encode(pixels, batch=batch)
    for name, value in expected.items():
        assert len(found[name]) == 5
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-5)


def test_the_order_of_tokens_is_row_by_row(encoder: Encoder) -> None:
    """A change in one patch moves its own token most."""
    pixels = photographs(1, 64, 80)
    changed = pixels.clone()
    row, column = 2, 3
    changed[:, :, 32:48, 48:64] = 255 - changed[:, :, 32:48, 48:64]
    assert encoder.grid((64, 80)) == (4, 5) and encoder.grid(64) == (4, 4)
    before, after = (encoder.encode(p, "features")["features"] for p in (pixels, changed))
    assert int((after - before).norm(dim=-1).argmax()) == row * 5 + column


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ((3, 40, 64), r"40 x 64.*32 x 64 and 48 x 64"),
        ((2, 3, 33, 47), r"33 x 47.*32 x 32 and 48 x 48"),
        ((3, 8, 8), r"8 x 8.*nearest: 16 x 16;"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(
    encoder: Encoder, shape: tuple[int, ...], words: str
) -> None:
    with pytest.raises(RadioError, match=words):
        encoder.encode(torch.zeros(shape, dtype=torch.uint8))
    with pytest.raises(RadioError, match=r"40 x 40.*nearest"):
        encoder.encode(torch.zeros(3, 64, 64), size=40)
    with pytest.raises(RadioError, match=r"50 x 64.*48 x 64 and 64 x 64"):
        encoder.grid((50, 64))


@pytest.mark.parametrize("shape", [(1, 64, 64), (64, 64, 3), (64, 64), (1, 1, 3, 64, 64)])
def test_tensors_that_are_no_pictures_are_refused(encoder: Encoder, shape: tuple[int, ...]) -> None:
    with pytest.raises(RadioError, match=r"no picture; expected \[3, H, W\]"):
        encoder.encode(torch.zeros(shape))


@pytest.mark.parametrize("size", [None, 32, (48, 64)])
@pytest.mark.parametrize("value", [255.0, -0.5, float("nan"), float("inf")])
def test_floats_out_of_range_are_refused(
    encoder: Encoder, value: float, size: int | tuple[int, int] | None
) -> None:
    """Also when they are resized, which clips them."""
    images = torch.rand(2, 3, 64, 48)
    images[1, 2, 5, 5] = value
    with pytest.raises(RadioError, match=r"expected uint8 or \[0, 1\]"):
        encoder.encode(images, size=size)
    with pytest.raises(RadioError, match="expected uint8, or floats"):
        encoder.encode(torch.zeros(3, 64, 64, dtype=torch.int64))


@pytest.mark.parametrize(
    ("given", "grid"),
    [((48, 40), (2, 3)), ((100, 30), (2, 6)), ((7, 5), (1, 1)), ((55, 57), (4, 3))],
)
def test_pictures_go_to_the_nearest_size(
    encoder: Encoder, given: tuple[int, int], grid: tuple[int, int], tmp_path: Path
) -> None:
    picture = colours(*given)
    picture.save(tmp_path / "p.png")
    resized = picture.resize((grid[1] * 16, grid[0] * 16), Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(np.array(resized)).permute(2, 0, 1)
    expected = encoder.encode(pixels)["features"]
    assert expected.shape[1] == grid[0] * grid[1]
    for form in (picture, tmp_path / "p.png"):
        assert torch.equal(encoder.encode(form)["features"], expected)


def test_a_size_is_a_side_or_height_and_width(encoder: Encoder) -> None:
    pixels, picture = photographs(1)[0], colours(48, 64)
    for form in (pixels, pixels.float() / 255, picture):
        assert encoder.encode(form, size=32)["features"].shape == (1, 4, 96)
        assert encoder.encode(form, size=(32, 80))["features"].shape == (1, 10, 96)
    tall, wide = (encoder.encode(picture, size=s)["features"] for s in ((32, 80), (80, 32)))
    assert not torch.allclose(tall, wide)
    same = encoder.encode(pixels, size=(64, 48))
    assert torch.equal(same["features"], encoder.encode(pixels)["features"])
    by_torch, by_pillow = (encoder.encode(f, size=32)["summary"] for f in (pixels, picture))
    assert rms_error(by_torch, by_pillow) < 0.02  # Pillow rounds to whole values


def test_pictures_of_several_sizes_need_a_size(encoder: Encoder) -> None:
    mixed = [colours(48, 64), colours(48, 64), colours(64, 48)]
    for batch in (1, 2, 16):
        with pytest.raises(RadioError, match=r"picture 2 is 48 x 64 px.*picture 0 is 64 x 48"):
            encoder.encode(mixed, batch=batch)
    together = encoder.encode(mixed, size=(64, 48))["features"]
    alone = encoder.encode(mixed[2], size=(64, 48))["features"]
    torch.testing.assert_close(together[2:], alone, rtol=1e-5, atol=1e-5)


def test_pictures_are_upright_rgb_of_eight_bits(encoder: Encoder, tmp_path: Path) -> None:
    (tmp_path / "turned.png").write_bytes(with_orientation(colours(48, 64), 6))
    (tmp_path / "deep.png").write_bytes(sixteen_bit(np.full((64, 48), 257 * 90)))
    turned = encoder.encode(Image.open(tmp_path / "turned.png"))["features"]
    assert torch.equal(turned, encoder.encode(tmp_path / "turned.png")["features"])
    upright = torch.rot90(photographs(1)[0], -1, (1, 2))
    assert torch.equal(turned, encoder.encode(upright)["features"])
    grey = encoder.encode(torch.full((3, 64, 48), 90, dtype=torch.uint8))["features"]
    for form in (tmp_path / "deep.png", Image.open(tmp_path / "deep.png")):
        assert torch.equal(encoder.encode(form)["features"], grey)


def test_pictures_that_cannot_be_read_are_named(encoder: Encoder, tmp_path: Path) -> None:
    (tmp_path / "cut.jpg").write_bytes(cut_in_half(jpeg(width=300, height=200)))
    with pytest.raises(DamagedImage, match=r"cut\.jpg: cannot decode"):
        encoder.encode([tmp_path / "cut.jpg"])
    with pytest.raises(DamagedImage, match=r"cannot decode.*JpegImageFile"):
        encoder.encode(Image.open(tmp_path / "cut.jpg"))
    with pytest.raises(RadioError, match=r"cannot read .*nowhere\.jpg"):
        encoder.encode(tmp_path / "nowhere.jpg")
    with pytest.raises(RadioError, match="no pictures were given"):
        encoder.encode([])
    with pytest.raises(RadioError, match="no pictures were given"):
        encoder.encode(torch.zeros(0, 3, 32, 32))
    with pytest.raises(RadioError, match="batch is 0"):
        encoder.encode(torch.zeros(1, 3, 32, 32), batch=0)


# what encode gives


def counting(encoder: Encoder) -> tuple[Counter[str], Callable[[], None]]:
    calls: Counter[str] = Counter()

    def counter(name: str) -> Callable[..., None]:
        def count(*_: object) -> None:
            calls[name] += 1

        return count

    modules = {
        f"{teacher}:{kind}": module
        for teacher, heads in encoder.heads.items()
        for kind, module in heads.items()
    }
    hooks = [
        module.register_forward_hook(counter(name))
        for name, module in {**modules, "backbone": encoder.backbone}.items()
    ]

    def remove() -> None:
        for hook in hooks:
            hook.remove()

    return calls, remove


@pytest.mark.parametrize(
    "wanted",
    [("summary",), ("features",), ("words:summary",), ("edges:features", "parts:summary")],
)
def test_only_the_heads_asked_for_run(encoder: Encoder, wanted: tuple[str, ...]) -> None:
    calls, remove = counting(encoder)
    try:
        found = encoder.encode(photographs(3), wanted, batch=2)
    finally:
        remove()
    assert list(found) == list(wanted)
    assert calls == {name: 2 for name in ("backbone", *wanted) if name not in encoder_own}


encoder_own = ("summary", "features")


def test_each_head_reads_its_own_row(encoder: Encoder) -> None:
    """`words` reads row 2 and `parts` row 0, by the small encoder's making."""
    images = photographs(2)
    with torch.no_grad():
        output = encoder.backbone(images)
    rows = {"words": 2, "parts": 0}
    for name, row in rows.items():
        expected = encoder.heads[name]["summary"](output.cls[:, row])
        assert torch.equal(encoder.encode(images, [f"{name}:summary"])[f"{name}:summary"], expected)
    both = encoder.encode(images, "summary")["summary"]
    assert torch.equal(both, torch.cat([output.cls[:, 0], output.cls[:, 2]], dim=1))
    assert encoder.feature_dims == {
        "summary": 192, "features": 96, "words:summary": 12, "words:features": 8,
        "parts:summary": 6, "parts:features": 7, "edges:features": 10,
        **{f"layer_{index}:features": 96 for index in range(3)},
    }  # fmt: skip


def test_unknown_names_list_the_known(encoder: Encoder) -> None:
    images = photographs(1)
    for wrong in ("edges:summary", "clip:summary", "sumary", "words", ""):
        with pytest.raises(RadioError, match=rf"'{wrong}'.*summary, features, words:summary"):
            encoder.encode(images, [wrong])
    with pytest.raises(RadioError, match=r"no feature is asked for.*edges:features"):
        encoder.encode(images, [])


@pytest.mark.parametrize("count", [1, 5, 11, 20])
def test_merging_gives_a_fixed_count(encoder: Encoder, count: int) -> None:
    images = photographs(2, 64, 80)
    names = ("summary", "features", "edges:features")
    found = encoder.encode(images, names, merge_to=count)
    assert set(found) == {*names, "sizes", "assignment"}
    assert found["features"].shape == (2, count, 96)
    assert found["edges:features"].shape == (2, count, 10)
    sizes, assignment = found["sizes"], found["assignment"]
    assert sizes.shape == (2, count) and assignment.shape == (2, 20)
    assert sizes.sum(dim=1).tolist() == [20, 20]
    assert assignment.min() == 0 and assignment.max() == count - 1
    plain = encoder.encode(images, names)
    assert torch.equal(found["summary"], plain["summary"])
    for number in range(2):
        members = torch.bincount(assignment[number], minlength=count)
        assert torch.equal(members.float(), sizes[number])
        for token in range(count):
            mean = plain["features"][number][assignment[number] == token].mean(dim=0)
            torch.testing.assert_close(found["features"][number, token], mean)
    head = encoder.heads["edges"]["features"]
    torch.testing.assert_close(found["edges:features"], head(found["features"].clone()))


def test_merging_to_more_tokens_than_there_are_keeps_them(encoder: Encoder) -> None:
    images = photographs(1)
    found = encoder.encode(images, "features", merge_to=99)
    assert torch.equal(found["features"], encoder.encode(images, "features")["features"])
    assert found["sizes"].tolist() == [[1.0] * 12]


def test_merging_that_makes_no_sense_is_refused(encoder: Encoder) -> None:
    for count in (0, -3):
        with pytest.raises(RadioError, match=f"merge_to is {count}"):
            encoder.encode(photographs(1), "features", merge_to=count)
    with pytest.raises(RadioError, match=r"ask for one of: features, words:features"):
        encoder.encode(photographs(1), ("summary", "words:summary"), merge_to=4)


def test_a_probe_can_be_trained_on_the_output(encoder: Encoder) -> None:
    found = encoder.encode(photographs(2), ("words:summary", "features"), merge_to=4)
    probe = torch.nn.Linear(12, 1)
    (
        probe(found["words:summary"]).sum() + (found["features"] * probe.weight[0, 0]).sum()
    ).backward()
    assert probe.weight.grad is not None and probe.weight.grad.abs().sum() > 0
    for value in found.values():
        assert not value.requires_grad and not value.is_inference()
        value.add_(1)


def test_an_encoder_stays_in_eval_inside_a_module_in_training(small: Path) -> None:
    encoder = radio.load(small)
    module = torch.nn.Sequential(encoder)
    images = photographs(1)
    expected = encoder.encode(images)["features"]
    module.train()
    assert not encoder.backbone.training
    assert torch.equal(encoder.encode(images)["features"], expected)
    assert not any(parameter.requires_grad for parameter in encoder.parameters())


def test_other_dtypes_are_close_and_normalise_in_float32(small: Path, encoder: Encoder) -> None:
    low = radio.load(small, device="cpu", dtype=torch.bfloat16)
    assert low.backbone.input_conditioner.norm_mean.dtype == torch.float32
    found = low.encode(photographs(2), encoder.feature_names)
    expected = encoder.encode(photographs(2), encoder.feature_names)
    for name, value in found.items():
        assert value.dtype == torch.bfloat16
        assert rms_error(value.float(), expected[name]) < 0.05
    assert low.fingerprint != encoder.fingerprint


def test_the_fingerprint_is_of_everything_that_is_read(small: Path, encoder: Encoder) -> None:
    assert radio.load(small).fingerprint == encoder.fingerprint
    weights = read_weights(small)
    swapped = {**weights.teachers, "words": replace(weights.teachers["words"], cls_row=1)}
    moved = {**weights.backbone}
    moved["blocks.0.norm1.bias"] = moved["blocks.0.norm1.bias"] + 1e-6
    for other in (
        replace(weights, summary_rows=(2, 0)),
        replace(weights, align_corners=True),
        replace(weights, teachers=swapped),
        replace(weights, backbone=moved),
    ):
        assert Encoder(other).fingerprint != encoder.fingerprint


def test_aligned_corners_are_kept_and_used(tmp_path: Path) -> None:
    weights = replace(small_weights(), align_corners=True)
    write_folder(weights, model_card(weights), tmp_path / "old")
    encoder = radio.load(tmp_path / "old")
    generator = encoder.backbone.patch_generator
    images = torch.rand(1, 3, 64, 96)
    table = generator.pos_embed
    found = generator(images)[0, 8:] - generator.embedder(generator.patchify(images))[0]
    expected = eval_positions(table, 4, 6, align_corners=True)[0]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(expected, eval_positions(table, 4, 6)[0], atol=1e-2)
    assert "align_corners=True" in (tmp_path / "old" / "README.md").read_text()
