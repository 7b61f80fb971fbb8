"""The encoder folder and Encoder.encode, judged by the student and by transformers' RadioModel."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from picture_zoo import colours, cut_in_half, jpeg, png, sixteen_bit, with_orientation
from PIL import Image
from safetensors.torch import load_file, save_file
from test_student import rms_error, shaken, small_vit
from tiny import tiny_config
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    PreTrainedConfig,
    RadioConfig,
    RadioModel,
)

import radio
from radio.data.decode import DamagedImage
from radio.encoder import folder as folder_module
from radio.encoder.card import model_card
from radio.encoder.encoder import Encoder
from radio.encoder.folder import config_of, read_weights, write_folder
from radio.encoder.layout import clean_backbone
from radio.encoder.weights import EncoderWeights, TeacherHeads, build_backbone
from radio.errors import RadioError
from radio.training.checkpoint import check_sums, find_checkpoint
from radio.training.distill import distill
from student.adaptors import MlpAdaptor
from student.model import Student, TeacherDims, build_student
from student.positions import eval_positions
from student.vit import SIZES

DIMS = {"words": TeacherDims(12, 8), "parts": TeacherDims(6, 7), "edges": TeacherDims(None, 10)}
SIZES_PX = [(128, 128), (64, 64), (96, 64), (48, 112), (176, 144), (160, 160)]  # table is 128


def head(width: int, out: int, depth: int = 2, seed: int = 0) -> dict[str, torch.Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return shaken(MlpAdaptor(width, out, 24, depth), seed).state_dict()


def small_weights(layer_scale: float | None = None) -> EncoderWeights:
    """Return a seeded encoder of three blocks; rows and heads out of order on purpose."""
    teachers = {
        "words": TeacherHeads(2, {"summary": head(96, 12), "features": head(96, 8, 4, 1)}),
        "parts": TeacherHeads(0, {"summary": head(96, 6, 2, 2), "features": head(96, 7, 2, 3)}),
        "edges": TeacherHeads(None, {"features": head(96, 10, 2, 4)}),
    }
    backbone = clean_backbone(small_vit(layer_scale=layer_scale).state_dict())
    return EncoderWeights(backbone, 3, 3, (0, 2), teachers, image_size=64)


def write_small(folder: Path, **changes: Any) -> Path:
    weights = replace(small_weights(), **changes)
    write_folder(weights, model_card(weights), folder)
    return folder


def photographs(count: int, height: int = 64, width: int = 48) -> torch.Tensor:
    pictures = [np.asarray(colours(width, height, seed)) for seed in range(count)]
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous()


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)  # the models are too small for two


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = tiny_config(tmp_path_factory.mktemp("run"), steps=1)
    config.data.val = None
    return distill(config).out


@pytest.fixture(scope="module")
def fused(run: Path) -> Path:
    return radio.fuse(run, run.parent / "encoder")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small(tmp_path_factory.mktemp("small") / "encoder")


@pytest.fixture(scope="module")
def encoder(small: Path) -> Encoder:
    return radio.load(small)


# the same weights in transformers


def judge_of(folder: Path) -> RadioModel:
    model, info = AutoModel.from_pretrained(
        folder, output_loading_info=True, trust_remote_code=False
    )
    assert isinstance(model, RadioModel)
    assert not any(info.values()), info
    return model.eval()


def compare(ours: Encoder, judge: RadioModel, sizes: list[tuple[int, int]], most: float) -> None:
    for size in sizes:
        images = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(size[0]))
        found = ours.encode(images)
        with torch.no_grad():
            expected = judge(pixel_values=images.to(judge.dtype))
        assert found["features"].shape == (2, size[0] * size[1] // 256, judge.config.hidden_size)
        assert rms_error(found["summary"], expected.summary) < most, size
        assert rms_error(found["features"], expected.features) < most, size
        assert expected.features.std() > 0.1


def test_transformers_computes_the_same(small: Path, encoder: Encoder) -> None:
    compare(encoder, judge_of(small), SIZES_PX, 1e-6)


def test_transformers_computes_the_same_in_float64(small: Path) -> None:
    ours = radio.load(small, dtype=torch.float64)
    compare(ours, judge_of(small).double(), SIZES_PX, 1e-12)


def test_transformers_computes_the_same_with_layer_scale(tmp_path: Path) -> None:
    """The folder has LayerScale folded, and neither reader loses it."""
    weights = small_weights(layer_scale=0.3)
    write_folder(weights, model_card(weights), tmp_path / "encoder")
    assert not any("ls1" in key or "scale" in key for key in weights.backbone)
    ours = radio.load(tmp_path / "encoder")
    compare(ours, judge_of(tmp_path / "encoder"), SIZES_PX, 1e-6)
    images = torch.rand(2, 3, 64, 96)
    with torch.no_grad():
        unfolded = small_vit(layer_scale=0.3).eval()(images)
    features = unfolded.features.flatten(2).transpose(1, 2)
    assert rms_error(ours.encode(images)["features"], features) < 1e-6


def test_transformers_computes_the_same_after_a_real_run(fused: Path) -> None:
    compare(radio.load(fused), judge_of(fused), [(64, 64), (32, 48), (96, 80)], 1e-6)


def seeded_radio_model(**options: Any) -> RadioModel:
    settings = {
        "hidden_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 3,
        "max_img_size": 128,
        "num_cls_tokens": 3,
        "num_registers": 5,
        "summary_idxs": [2, 0],
        "norm_mean": [0.4, 0.5, 0.6],
        "norm_std": [0.2, 0.3, 0.4],
        **options,
    }
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = RadioModel(RadioConfig(**settings))
    assert isinstance(model, RadioModel)
    shaken(model)
    return model


@pytest.mark.parametrize(
    "options",
    [{}, {"layerscale_value": 0.4}, {"patch_size": 8, "mlp_ratio": 3.7, "summary_idxs": [1]}],
)
def test_a_folder_of_transformers_loads_as_an_encoder(
    options: dict[str, Any], tmp_path: Path
) -> None:
    judge = seeded_radio_model(**options)
    judge.save_pretrained(tmp_path / "theirs")
    ours = radio.load(tmp_path / "theirs")
    assert ours.feature_names == ("summary", "features")
    patch = judge.config.patch_size
    for rows, columns in ((8, 8), (4, 6), (6, 4), (11, 9), (16, 16)):
        images = torch.rand(2, 3, rows * patch, columns * patch)
        with torch.no_grad():
            expected = judge(pixel_values=images)
        found = ours.encode(images)
        assert rms_error(found["summary"], expected.summary) < 1e-6
        assert rms_error(found["features"], expected.features) < 1e-6
    radio.fuse(tmp_path / "theirs", tmp_path / "ours")
    again, info = AutoModel.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info.values())
    with torch.no_grad():
        assert rms_error(again(pixel_values=images).features, expected.features) < 1e-6


def test_both_state_dicts_hold_the_same_tensors(tmp_path: Path) -> None:
    judge = seeded_radio_model()
    judge.save_pretrained(tmp_path)
    ours = radio.load(tmp_path).backbone.state_dict()
    theirs = judge.state_dict()
    for number in range(3):
        prefix = f"encoder.layer.{number}.attention"
        joined = torch.cat([theirs[f"{prefix}.{part}_proj.bias"] for part in "qkv"])
        assert torch.equal(ours[f"blocks.{number}.attn.qkv.bias"], joined)
    table = theirs["embeddings.position_embedding"]
    assert torch.equal(ours["patch_generator.pos_embed"], table)
    assert torch.equal(ours["input_conditioner.norm_std"], theirs["input_conditioner.norm_std"])


@pytest.mark.parametrize(
    ("option", "value"), [("hidden_act", "relu"), ("layer_norm_eps", 1e-5), ("num_channels", 4)]
)
def test_a_radio_model_that_ours_cannot_be_is_refused(
    option: str, value: object, tmp_path: Path
) -> None:
    settings = {} if option == "num_channels" else {option: value}
    seeded_radio_model(**settings).save_pretrained(tmp_path)
    change_config(tmp_path, {option: value})
    with pytest.raises(RadioError, match=rf"config\.json has {option} {value!r}.*can only have"):
        radio.load(tmp_path)


def test_transformers_gets_the_mlp_width_of_every_size() -> None:
    weights = small_weights()
    for shape in SIZES.values():
        narrow = torch.zeros(shape.mlp_hidden, shape.width)
        changed = {**weights.backbone, "blocks.0.mlp.fc1.weight": narrow}
        config = json.loads(json.dumps(config_of(replace(weights, backbone=changed))))
        assert int(config["hidden_size"] * config["mlp_ratio"]) == shape.mlp_hidden


# fused from a run


def student_of(run: Path) -> tuple[Student, Any]:
    checkpoint = find_checkpoint(run)
    config = checkpoint.config.student
    student = build_student(
        size=config.size,
        patch_size=config.patch_size,
        image_size=config.image_size,
        dims=DIMS,
        adaptor_hidden=config.adaptor_hidden,
    )
    student.load_state_dict(checkpoint.model)
    return student.eval(), checkpoint


def test_a_fused_encoder_is_the_student_and_the_inverse_standardizer(
    run: Path, fused: Path
) -> None:
    student, checkpoint = student_of(run)
    encoder = radio.load(fused)
    names = [name for name in encoder.feature_names if ":" in name]
    assert names == [
        "words:summary", "words:features", "parts:summary", "parts:features", "edges:features",
    ]  # fmt: skip
    images = photographs(3)
    found = encoder.encode(images, ["summary", "features", *names])
    with torch.no_grad():
        outputs = student(images)
    for name, output in outputs.items():
        predicted = output.features.flatten(2).transpose(1, 2).double()
        expected = checkpoint.standardizers[name].inverse_transform(predicted)
        assert rms_error(found[f"{name}:features"].double(), expected) < 1e-5, name
        assert rms_error(predicted, expected) > 0.01, "the standardizer does nothing"
        if output.summary is not None:
            assert rms_error(found[f"{name}:summary"], output.summary) < 1e-5, name
    assert found["features"].shape == (3, 12, 192) and found["summary"].shape == (3, 2 * 192)
    assert not torch.equal(found["words:summary"][0], found["words:summary"][1])


def test_the_config_says_what_was_fused(run: Path, fused: Path) -> None:
    config = json.loads((fused / "config.json").read_text())
    assert {name: block["cls_row"] for name, block in config["adaptors"].items()} == {
        "words": 0, "parts": 1, "edges": None,
    }  # fmt: skip
    assert config["adaptors"]["words"]["feature_dim"] == 8
    assert "summary_dim" not in config["adaptors"]["edges"]
    assert (config["num_cls_tokens"], config["num_registers"]) == (2, 6)
    assert config["image_size"] == 64 and config["origin"]["step"] == 1
    fingerprint = find_checkpoint(run).state["teachers"]["words"]["fingerprint"]
    assert config["adaptors"]["words"]["fingerprint"] == fingerprint
    card = (fused / "README.md").read_text()
    assert fingerprint[:12] in card and 'features=("summary", "words:summary"' in card


def test_a_step_folder_and_an_encoder_folder_can_be_fused_too(
    run: Path, fused: Path, tmp_path: Path
) -> None:
    expected = radio.load(fused).fingerprint
    for source in (run / "checkpoints" / "step-000001", fused):
        again = radio.fuse(source, tmp_path / source.name)
        assert radio.load(again).fingerprint == expected
        theirs, ours = (json.loads((f / "config.json").read_text()) for f in (fused, again))
        assert ours == theirs
        assert (again / "README.md").read_text() == (fused / "README.md").read_text()


def test_a_damaged_checkpoint_is_named_and_nothing_written(run: Path, tmp_path: Path) -> None:
    step = shutil.copytree(run / "checkpoints" / "step-000001", tmp_path / "step-000001")
    data = bytearray((step / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (step / "model.safetensors").write_bytes(data)
    with pytest.raises(RadioError, match=r"step-000001.model\.safetensors is missing or damaged"):
        radio.fuse(step, tmp_path / "encoder")
    assert not (tmp_path / "encoder").exists()
    with pytest.raises(RadioError, match=r"nowhere is neither a run folder"):
        radio.fuse(tmp_path / "nowhere", tmp_path / "encoder")


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


# the folder


def change_config(folder: Path, changes: Mapping[str, object], drop: str | None = None) -> None:
    config = json.loads((folder / "config.json").read_text())
    config.update(changes)
    config.pop(drop or "", None)
    (folder / "config.json").write_text(json.dumps(config))


def copied(small: Path, tmp_path: Path) -> Path:
    return shutil.copytree(small, tmp_path / "copy")


def test_a_folder_is_whole_and_its_sums_verify(small: Path) -> None:
    assert {path.name for path in small.iterdir()} == set(folder_module.FILES)
    check_sums(small)
    done = subprocess.run(
        ["sha256sum", "--strict", "-c", "SHA256SUMS"], cwd=small, capture_output=True, text=True
    )
    assert done.returncode == 0 and done.stdout.count(": OK") == 5, done.stderr
    assert list(small.parent.iterdir()) == [small]


def test_the_config_is_transformers_own(small: Path) -> None:
    config = AutoConfig.from_pretrained(small)
    assert isinstance(config, RadioConfig)
    ours = json.loads((small / "config.json").read_text())
    known = RadioConfig().to_dict()
    extra = {"adaptors", "origin", "cpe_align_corners"}
    assert set(ours) - set(known) == extra, "neither RadioConfig's nor ours"
    derived = {"patch_dim", "video_patch_dim"}
    assert set(known) - set(ours) <= {*PreTrainedConfig().to_dict(), *derived}


def test_the_processor_makes_the_pixels_that_encode_makes(small: Path, encoder: Encoder) -> None:
    processor = AutoImageProcessor.from_pretrained(small)
    picture = colours(90, 70)
    pixels = processor(picture, return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 3, 64, 64)
    resized = torch.from_numpy(np.array(picture.resize((64, 64), Image.Resampling.BICUBIC)))
    assert (pixels[0] - resized.permute(2, 0, 1) / 255).abs().max() <= 2 / 255
    same = processor(colours(64, 64), return_tensors="pt")["pixel_values"]
    found, expected = (encoder.encode(form)["summary"] for form in (same, colours(64, 64)))
    assert rms_error(found, expected) < 1e-6


def test_a_truncated_file_is_named_with_the_way_out(small: Path, tmp_path: Path) -> None:
    for name in ("model.safetensors", "adaptors.safetensors"):
        folder = copied(small, tmp_path)
        data = (folder / name).read_bytes()
        for length in (0, 5, 100, len(data) // 2, len(data) - 1):
            (folder / name).write_bytes(data[:length])
            with pytest.raises(RadioError, match=rf"copy.{name} is .*no whole.*`radio fuse`"):
                radio.load(folder)
        shutil.rmtree(folder)


def test_a_missing_file_is_named_with_the_way_out(small: Path, tmp_path: Path) -> None:
    folder = copied(small, tmp_path)
    (folder / "adaptors.safetensors").unlink()
    with pytest.raises(RadioError, match=r"copy.adaptors\.safetensors is missing.*`radio fuse`"):
        radio.load(folder)
    for name in ("model.safetensors", "config.json"):
        (folder / name).unlink()
        with pytest.raises(RadioError, match=r"copy is no encoder folder.*radio fuse.*found"):
            radio.load(folder)
    (tmp_path / "empty").mkdir()
    with pytest.raises(RadioError, match=r"expected config\.json and model.*found nothing"):
        radio.load(tmp_path / "empty")
    with pytest.raises(RadioError, match=r"nowhere does not exist; expected an encoder folder"):
        radio.load(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("changes", "drop", "words"),
    [
        ({"model_type": "clip"}, None, r"config\.json has model_type 'clip'; expected 'radio'"),
        ({}, "model_type", r"config\.json has model_type None; expected 'radio'"),
        ({}, "num_cls_tokens", r"config\.json lacks num_cls_tokens.*`radio fuse`"),
        ({}, "num_attention_heads", r"config\.json lacks num_attention_heads"),
        ({"num_cls_tokens": 2}, None, r"'summary' reads the CLS rows \[0, 2\].*2 are said"),
        ({"num_cls_tokens": 99}, None, r"8 prefix tokens, of which 99"),
        ({"num_hidden_layers": 4}, None, r"3 blocks but its config\.json says 4"),
        ({"args": None, "model_type": "vit"}, None, "model_type 'vit'"),
    ],
)
def test_a_config_that_does_not_fit_is_named(
    changes: dict[str, object], drop: str | None, words: str, small: Path, tmp_path: Path
) -> None:
    folder = copied(small, tmp_path)
    change_config(folder, changes, drop)
    with pytest.raises(RadioError, match=words):
        radio.load(folder)


@pytest.mark.parametrize("data", [b"{", b"\xff\xfe\x00", b"[]", b""])
def test_a_config_that_is_no_settings_is_named(data: bytes, small: Path, tmp_path: Path) -> None:
    folder = copied(small, tmp_path)
    (folder / "config.json").write_bytes(data)
    with pytest.raises(RadioError, match=r"copy.config\.json (is no JSON|holds a list)"):
        radio.load(folder)


def test_heads_that_are_missing_or_cut_are_named(small: Path, tmp_path: Path) -> None:
    folder = copied(small, tmp_path)
    heads = load_file(folder / "adaptors.safetensors")
    whole = {key: value for key, value in heads.items() if not key.startswith("words.summary.")}
    save_file(whole, folder / "adaptors.safetensors")
    with pytest.raises(RadioError, match=r"adaptors\.safetensors lacks the head words:summary"):
        radio.load(folder)
    for lost in ("fc1.weight", "final.2.weight", "final.0.bias", "blocks.0.2.weight"):
        key = f"words.features.{lost}"
        save_file({k: v for k, v in heads.items() if k != key}, folder / "adaptors.safetensors")
        with pytest.raises(RadioError, match=rf"words:features.*{lost}"):
            radio.load(folder)


def test_backbone_keys_that_are_missing_or_wrong_are_named(small: Path, tmp_path: Path) -> None:
    folder = copied(small, tmp_path)
    whole = load_file(folder / "model.safetensors")
    for lost in ("blocks.1.norm1.weight", "patch_generator.pos_embed", "blocks.0.mlp.fc1.weight"):
        kept = {key: value for key, value in whole.items() if not key.endswith(lost)}
        save_file(kept, folder / "model.safetensors")
        with pytest.raises(RadioError, match=lost):
            radio.load(folder)
    wrong = {**whole, "radio_model.model.blocks.1.norm1.weight": torch.zeros(7)}
    save_file(wrong, folder / "model.safetensors")
    with pytest.raises(RadioError, match=r"norm1\.weight.*size mismatch|size mismatch.*norm1"):
        radio.load(folder)


def test_a_model_in_several_files_is_read_whole_or_refused(tmp_path: Path) -> None:
    judge = seeded_radio_model()
    judge.save_pretrained(tmp_path, max_shard_size="200KB")
    files = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(files) > 2
    images = torch.rand(1, 3, 32, 32)
    with torch.no_grad():
        expected = judge(pixel_values=images).features
    assert rms_error(radio.load(tmp_path).encode(images)["features"], expected) < 1e-6
    files[-1].unlink()
    with pytest.raises(RadioError, match=rf"{files[-1].name} is missing"):
        radio.load(tmp_path)


def test_files_of_the_user_are_never_destroyed(small: Path, tmp_path: Path) -> None:
    weights = read_weights(small)
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("years")
    with pytest.raises(RadioError, match=r"foreign exists and is no encoder folder"):
        write_folder(weights, "", foreign)
    beside = copied(small, tmp_path)
    (beside / "thesis.tex").write_text("years")
    with pytest.raises(RadioError, match=r"also holds thesis\.tex.*would delete"):
        write_folder(weights, "", beside)
    other = tmp_path / "other"
    seeded_radio_model().save_pretrained(other)
    with pytest.raises(RadioError, match=r"other exists and is no encoder folder"):
        write_folder(weights, "", other)
    file = tmp_path / "file"
    file.write_text("years")
    with pytest.raises(RadioError, match=r"file exists and is no encoder folder"):
        write_folder(weights, "", file)
    assert (foreign / "thesis.tex").exists() and (beside / "thesis.tex").exists()
    assert file.read_text() == "years"
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"foreign", "copy", "other", "file"}


def test_an_older_encoder_is_replaced_and_an_empty_folder_filled(tmp_path: Path) -> None:
    (tmp_path / "encoder").mkdir()
    first = radio.load(write_small(tmp_path / "encoder")).fingerprint
    second = radio.load(write_small(tmp_path / "encoder", summary_rows=(1,))).fingerprint
    assert first != second
    assert [path.name for path in tmp_path.iterdir()] == ["encoder"]
    written = write_small(tmp_path / "deep" / "er" / "encoder")
    assert radio.load(written).fingerprint == first


def test_a_link_and_the_current_folder_can_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, link = tmp_path / "real", tmp_path / "link"
    write_small(real)
    link.symlink_to(real)
    write_small(link, summary_rows=(1,))
    assert link.is_symlink() and radio.load(real).summary_rows == [1]
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    write_small(Path("."))
    assert radio.load(tmp_path / "here").summary_rows == [0, 2]
    assert {path.name for path in tmp_path.iterdir()} == {"real", "link", "here"}


@pytest.mark.parametrize("at", ["write", "rename"])
def test_a_write_that_fails_leaves_the_older_encoder(
    at: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_small(tmp_path / "encoder")
    before = radio.load(folder).fingerprint
    rename = Path.rename

    def failing(self: Path, target: Path) -> Path:
        if self.name.startswith(".tmp-"):
            raise OSError("the disk is gone")
        return rename(self, target)

    def full(*_: object) -> None:
        raise OSError("no space left")

    if at == "rename":
        monkeypatch.setattr(Path, "rename", failing)
    else:
        monkeypatch.setattr(folder_module, "write_sums", full)
    with pytest.raises(OSError, match=r"the disk is gone|no space left"):
        write_small(folder, summary_rows=(1,))
    monkeypatch.undo()
    assert radio.load(folder).fingerprint == before
    assert [path.name for path in tmp_path.iterdir()] == ["encoder"]


def test_weights_that_cannot_be_loaded_are_not_written(tmp_path: Path) -> None:
    theirs = tmp_path / "theirs"
    seeded_radio_model().save_pretrained(theirs)
    change_config(theirs, {"num_cls_tokens": 2})  # but the summary reads row 2
    with pytest.raises(RadioError, match="'summary' reads the CLS rows"):
        radio.fuse(theirs, tmp_path / "ours")
    assert not (tmp_path / "ours").exists()
    weights = small_weights()
    rowless = {"words": replace(weights.teachers["words"], cls_row=None)}
    with pytest.raises(RadioError, match="'words:summary' reads the CLS rows"):
        build_backbone(replace(weights, teachers=rowless))


def test_vllm_is_told_only_of_vits_that_it_knows(small: Path) -> None:
    weights = read_weights(small)
    assert "model_name" not in config_of(weights)
    width, state = 384, dict(weights.backbone)
    state["blocks.0.mlp.fc1.weight"] = torch.zeros(4 * width, width)
    teachers = {
        name: TeacherHeads(row, {"summary": head(96, 4)}) for name, row in (("b", 1), ("a", 0))
    }
    known = config_of(replace(weights, backbone=state, num_cls=2, teachers=teachers))
    assert known["model_name"] == "vit_small_patch16_224" and known["cpe_max_size"] == 128
    assert [teacher["name"] for teacher in known["teachers"]] == ["a", "b"]
    assert known["register_multiple"] == 8
    assert "model_name" not in config_of(replace(weights, backbone=state, teachers=teachers))
