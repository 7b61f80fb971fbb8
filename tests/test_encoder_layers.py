"""Encoder.encode: patches in the middle of the backbone, and attention within windows."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small_encoder import change_config, photographs, seeded_radio_model, small_weights, write_small
from test_student import rms_error
from torch import Tensor

import radio
from radio.encoder.encoder import Encoder
from radio.encoder.folder import read_weights
from radio.encoder.layers import tokens_after
from radio.errors import RadioError

NUM_PREFIX = 8
NAMES = [f"layer_{index}:features" for index in range(3)]


@pytest.fixture(autouse=True)
def _one_thread(_two_threads: None) -> None:
    torch.set_num_threads(1)  # the models are too small for two


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return Encoder(small_weights())


@pytest.fixture(scope="module")
def windowed() -> Encoder:
    """Return one whose first block is windowed."""
    return Encoder(replace(small_weights(), num_windowed=1))


def by_hand(encoder: Encoder, images: Tensor) -> list[Tensor]:
    backbone = encoder.backbone
    found = []
    with torch.inference_mode():
        tokens = backbone.patch_generator(backbone.input_conditioner(images))
        for block in backbone.blocks:
            tokens = block(tokens)
            found.append(tokens[:, NUM_PREFIX:])
    return found


# layers


@pytest.mark.parametrize("size", [(64, 80), (128, 128), (176, 144)])  # the table is of 128
def test_layers_are_the_blocks_run_by_hand(encoder: Encoder, size: tuple[int, int]) -> None:
    images = photographs(3, *size)
    found = encoder.encode(images, NAMES)
    assert list(found) == NAMES
    for name, expected in zip(NAMES, by_hand(encoder, images), strict=True):
        assert found[name].shape == (3, size[0] * size[1] // 256, 96)
        assert torch.equal(found[name], expected), name
    assert torch.equal(found[NAMES[-1]], encoder.encode(images, "features")["features"])


def test_transformers_has_the_same_hidden_states(tmp_path: Path) -> None:
    judge = seeded_radio_model()
    judge.save_pretrained(tmp_path)
    ours = radio.load(tmp_path)
    images = torch.rand(2, 3, 96, 64)
    with torch.no_grad():
        states = judge(pixel_values=images, output_hidden_states=True).hidden_states
    assert len(states) == 4  # before the first block, and after each
    found = ours.encode(images, NAMES)
    for name, state in zip(NAMES, states[1:], strict=True):
        assert rms_error(found[name], state[:, NUM_PREFIX:]) < 1e-6, name
    assert rms_error(found[NAMES[0]], found[NAMES[1]]) > 0.01


def test_layers_count_from_both_ends_and_keep_one_name(encoder: Encoder) -> None:
    images = photographs(2)
    found = encoder.encode(images, "summary", layers=(-1, 0))
    assert list(found) == ["summary", NAMES[2], NAMES[0]]
    named = encoder.encode(images, (NAMES[2], NAMES[0]))
    for name, value in named.items():
        assert torch.equal(found[name], value)
    assert list(encoder.encode(images, (), layers=[1, -2])) == [NAMES[1]]
    batches = encoder.encode(images, (), layers=[0], batch=1)[NAMES[0]]
    torch.testing.assert_close(batches, named[NAMES[0]], rtol=1e-5, atol=1e-5)


def test_unknown_layers_are_refused_with_the_range(encoder: Encoder) -> None:
    images = photographs(1)
    for wrong in (3, -4, 99):
        with pytest.raises(RadioError, match=rf"no layer {wrong}; .*0 to 2, or -3 to -1"):
            encoder.encode(images, layers=[0, wrong])
    for name in ("layer_3:features", "layer_-1:features", "layer_1:summary", "layer_01:features"):
        with pytest.raises(RadioError, match=rf"'{name}'.*layer_0:features to layer_2:features"):
            encoder.encode(images, name)


def test_layers_have_dims_but_are_not_what_comes_out_at_the_end(encoder: Encoder) -> None:
    assert [encoder.feature_dims[name] for name in NAMES] == [96, 96, 96]
    assert not set(NAMES) & set(encoder.feature_names)


def test_a_teacher_may_be_called_like_a_layer() -> None:
    weights = small_weights()
    encoder = Encoder(replace(weights, teachers={"layer_1": weights.teachers["parts"]}))
    images = photographs(1)
    assert encoder.encode(images, "layer_1:features")["layer_1:features"].shape == (1, 12, 7)
    assert encoder.feature_dims["layer_1:features"] == 7
    assert "layer_1:features" in encoder.feature_names


def test_layers_merge_as_the_features_do(encoder: Encoder) -> None:
    images = photographs(2, 64, 80)
    found = encoder.encode(images, ("features", NAMES[0]), merge_to=7)
    plain = encoder.encode(images, NAMES[0])[NAMES[0]]
    assert found[NAMES[0]].shape == found["features"].shape == (2, 7, 96)
    for number in range(2):
        for token in range(7):
            members = found["assignment"][number] == token
            mean = plain[number][members].mean(dim=0)
            torch.testing.assert_close(found[NAMES[0]][number, token], mean)
    alone = encoder.encode(images, NAMES[0], merge_to=7)[NAMES[0]]
    assert torch.equal(alone, found[NAMES[0]])


def test_layers_leave_nothing_behind(encoder: Encoder) -> None:
    images = photographs(1)
    with pytest.raises(RuntimeError, match="midway"), tokens_after(encoder.backbone.blocks, {0, 1}):
        raise RuntimeError("midway")
    encoder.encode(images, NAMES)
    assert not any(block._forward_hooks for block in encoder.backbone.blocks)


def test_another_thread_s_pictures_are_not_taken(encoder: Encoder) -> None:
    """Serving threads share the blocks."""
    mine, other = photographs(2).chunk(2)
    with torch.no_grad(), tokens_after(encoder.backbone.blocks, {0}) as tokens:
        encoder.backbone(mine)
        thread = threading.Thread(target=encoder.backbone, args=(other,))
        thread.start()
        thread.join()
        found = tokens[0][:, NUM_PREFIX:]
    assert torch.equal(found, by_hand(encoder, mine)[0])


# windows


@pytest.mark.parametrize("window", [1, 2, 4])
def test_windows_are_the_backbones(windowed: Encoder, window: int) -> None:
    images = photographs(2, 64, 128)
    names = ("summary", "features", "words:summary", "edges:features")
    found = windowed.encode(images, names, window=window)
    with torch.inference_mode():
        output = windowed.backbone(images, window=window)
    patches = output.features.flatten(2).transpose(1, 2)
    assert torch.equal(found["features"], patches)
    assert torch.equal(found["edges:features"], windowed.heads["edges"]["features"](patches))
    assert torch.equal(found["summary"], output.cls[:, [0, 2]].flatten(1))
    assert rms_error(found["features"], windowed.encode(images)["features"]) > 1e-3


@pytest.mark.parametrize("window", [2, 4])
def test_layers_of_a_windowed_forward_lie_row_by_row(windowed: Encoder, window: int) -> None:
    """A layer is what comes out of a backbone that ends after it."""
    images = photographs(2, 64, 128)
    found = windowed.encode(images, (), layers=(0, 1, 2), window=window)
    cut = Encoder(replace(small_weights(), num_windowed=1))
    for depth in (2, 1):
        del cut.backbone.blocks[depth]
        cut.backbone.is_windowed = cut.backbone.is_windowed[:depth]
        with torch.inference_mode():
            output = cut.backbone(images, window=window)
        expected = output.features.flatten(2).transpose(1, 2)
        assert torch.equal(found[NAMES[depth - 1]], expected), depth
    global_ = windowed.encode(images, NAMES[0])[NAMES[0]]
    assert rms_error(found[NAMES[0]], global_) > 1e-3


def test_a_window_that_does_not_fit_is_refused_with_what_fits(windowed: Encoder) -> None:
    images = photographs(1, 96, 64)
    with pytest.raises(RadioError, match=r"96 px is 6 patches.*window of 4.*64 and 128 px.*1, 2\."):
        windowed.encode(images, window=4)
    assert windowed.encode(images, size=(128, 64), window=4)["features"].shape == (1, 32, 96)
    for window in (0, -2):
        with pytest.raises(RadioError, match=rf"window is {window}.*6 x 4 patches: 1, 2\."):
            windowed.encode(images, window=window)


def test_a_window_without_windowed_blocks_is_refused(encoder: Encoder) -> None:
    """Three blocks for four global ones leave none."""
    with pytest.raises(RadioError, match="window is 2, but this backbone of 3 blocks has none"):
        encoder.encode(photographs(1, 64, 64), window=2)


def test_the_folder_says_which_blocks_are_windowed(tmp_path: Path) -> None:
    folder = write_small(tmp_path / "encoder", num_windowed=1, num_global=2)
    weights = read_weights(folder)
    assert (weights.num_windowed, weights.num_global) == (1, 2)
    assert Encoder(weights).backbone.is_windowed == [True, False, False]
    change_config(folder, {}, "vitdet_num_windowed")
    change_config(folder, {}, "vitdet_num_global")  # an older folder
    older = read_weights(folder)
    assert (older.num_windowed, older.num_global) == (None, 4)
