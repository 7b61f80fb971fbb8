"""NVIDIA's published layouts: the hub's .pth.tar and the folder of their remote code."""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from picture_zoo import png
from safetensors.torch import save_file
from small_encoder import head, photographs
from test_student import rms_error, shaken
from torch import nn
from transformers import AutoModel

import radio
from radio.encoder.folder import read_weights
from radio.encoder.published import published_with_aligned_corners, windows_of
from radio.errors import RadioError
from student.vit import VisionTransformer, VitShape

SHAPE = VitShape(192, 2, 3, 768)
State = dict[str, torch.Tensor]


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def backbone(num_cls: int = 3, layer_scale: float | None = None) -> VisionTransformer:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = VisionTransformer(
            SHAPE,
            image_size=64,
            num_cls=num_cls,
            num_registers=8 - num_cls,
            layer_scale=layer_scale,
        )
    shaken(model)
    return model


def under(prefix: str, state: Mapping[str, torch.Tensor]) -> State:
    return {f"{prefix}{key}": value for key, value in state.items()}


def teacher(name: str, kind: str = "open_clip", **options: Any) -> dict[str, Any]:
    return {"name": name, "type": kind, "model": f"{name}-model", "use_summary": True, **options}


THREE = [teacher("clip"), teacher("siglip2-g", "siglip2"), teacher("sam3", "sam3")]


def hub_state(model: VisionTransformer, heads: Mapping[str, State]) -> State:
    own = model.state_dict()
    base = {key: value for key, value in own.items() if not key.startswith("input_conditioner.")}
    conditioner = {key: value for key, value in own.items() if key not in base}
    state = {**under("base_model.", base), **conditioner}
    for prefix, values in heads.items():
        state |= under(f"{prefix}.", values)
    return state


def write_pth(
    path: Path,
    heads: Mapping[str, State] | None = None,
    teachers: Sequence[Mapping[str, Any]] = THREE,
    model: VisionTransformer | None = None,
    **options: Any,
) -> Path:
    """Write what NVIDIA's hub holds; `options` are args, `state_dict_ema` a second state."""
    heads = {"_heads.clip": head(192, 5)} if heads is None else heads
    ema = options.pop("state_dict_ema", {})
    args = argparse.Namespace(
        model="vit_tiny_patch16_224",
        teachers=[dict(item) for item in teachers],
        cls_token_per_teacher=options.pop("cls_token_per_teacher", True),
        spectral_reparam=False,
        **options,
    )
    state = hub_state(model or backbone(), heads)
    checkpoint = {"arch": "vit", "epoch": 299, "state_dict": state, "args": args, **ema}
    torch.save(checkpoint, path)
    return path


def numbers(encoder: radio.Encoder, model: VisionTransformer, heads: Mapping[str, Any]) -> None:
    """Compare every feature with what the modules give; `heads` is name -> (row or None, head)."""
    images = photographs(2, 48, 64)
    with torch.no_grad():
        output = model.eval()(images)
        patches = output.features.flatten(2).transpose(1, 2)
        found = encoder.encode(images, encoder.feature_names)
        assert rms_error(found["features"], patches) < 1e-6
        for name, (row, module) in heads.items():
            expected = module(patches if row is None else output.cls[:, row])
            assert rms_error(found[name], expected) < 5e-6, name


class MlpV1(nn.Module):
    """Upstream's first head: Linear, LayerNorm, ReLU, Linear."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.norm, self.fc2 = nn.Linear(192, 16), nn.LayerNorm(16), nn.Linear(16, 5)


class AttentionHead(nn.Module):
    """Upstream's attention head: two blocks, then an MLP of version 2."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.ModuleDict({"norm1": nn.LayerNorm(192)}) for _ in range(2))


def attention_head() -> State:
    return {**AttentionHead().state_dict(), **under("mlp.", head(192, 5))}


def as_module(state: State) -> nn.Module:
    from student.adaptors import MlpAdaptor

    hidden, width = state["fc1.weight"].shape
    depth = 2 + len({key.split(".")[1] for key in state if key.startswith("blocks.")})
    module = MlpAdaptor(width, len(state["final.2.weight"]), hidden, depth)
    module.load_state_dict(state)
    return module


# the hub's .pth.tar


def test_a_hub_checkpoint_is_an_encoder(tmp_path: Path) -> None:
    heads = {
        "_heads.clip": head(192, 5, 2, 1),
        "_feature_projections.clip": head(192, 6, 4, 2),
        "_heads.siglip2-g": head(192, 7, 3, 3),
        "_feature_projections.sam3": head(192, 9, 2, 4),
    }
    encoder = radio.load(write_pth(tmp_path / "c-radio_v9.pth.tar", heads))
    assert encoder.feature_names == (
        "summary", "features", "clip:summary", "clip:features", "siglip2-g:summary",
        "sam3:features",
    )  # fmt: skip
    rows = {"clip:summary": 0, "siglip2-g:summary": 1, "clip:features": None, "sam3:features": None}
    modules = {f"{k.split('.')[1]}:{'summary' if 'heads' in k else 'features'}": as_module(v)
               for k, v in heads.items()}  # fmt: skip
    numbers(encoder, backbone(), {name: (rows[name], modules[name]) for name in rows})
    assert encoder.summary_rows == [0, 1, 2]


def test_it_fuses_into_a_folder_that_transformers_loads(tmp_path: Path) -> None:
    scaled = backbone(layer_scale=0.3)
    state = hub_state(scaled, {"_heads.clip": head(192, 5)})
    renamed = {key.replace("gamma", "grandma"): value for key, value in state.items()}
    path = write_pth(tmp_path / "v4.pth.tar", state_dict_ema={"state_dict_ema": renamed})
    folder = radio.fuse(path, tmp_path / "encoder")
    assert radio.load(folder).fingerprint == radio.load(path).fingerprint
    judge, info = AutoModel.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values())
    images = torch.rand(2, 3, 48, 64)
    with torch.no_grad():
        expected = scaled(images).features.flatten(2).transpose(1, 2)
        assert rms_error(judge(pixel_values=images).features, expected) < 1e-6
    config = json.loads((folder / "config.json").read_text())
    assert config["origin"] == {
        "file": "v4.pth.tar", "arch": "vit_tiny_patch16_224", "weights": "state_dict_ema",
    }  # fmt: skip
    assert config["adaptors"]["clip"]["options"] == {"model": "clip-model"}
    assert "clip-model" in (folder / "README.md").read_text()


def test_the_moving_average_goes_before_the_weights(tmp_path: Path) -> None:
    model = backbone()
    other = {key: value + 1 for key, value in hub_state(model, {}).items()}
    averaged = under("module.", hub_state(model, {"_heads.clip": head(192, 5)}))
    torch.save(
        {
            "state_dict": other,
            "state_dict_ema": averaged,
            "args": argparse.Namespace(teachers=THREE),
        },
        tmp_path / "v4.pth",
    )
    encoder = radio.load(tmp_path / "v4.pth")
    numbers(encoder, model, {"clip:summary": (0, as_module(head(192, 5)))})


@pytest.mark.parametrize("prefix", ["_heads.1", "_heads.two"])
def test_heads_lie_under_a_name_or_a_number_and_never_under_a_longer_one(
    prefix: str, tmp_path: Path
) -> None:
    teachers = [teacher(f"t{i}") for i in range(11)]
    teachers[1]["name"], teachers[10]["name"] = "two", "two_more"
    own = head(192, 5, 2, 1)
    heads = {prefix: own, "_heads.10": head(192, 6), "_heads.two_more": head(192, 7)}
    model = VisionTransformer(SHAPE, image_size=64, num_cls=11, num_registers=5)
    shaken(model)
    path = write_pth(tmp_path / "v4.pth.tar", heads, teachers, model)
    encoder = radio.load(path)
    assert encoder.feature_dims["two:summary"] == 5
    assert encoder.feature_dims["two_more:summary"] == 7
    numbers(encoder, model, {"two:summary": (1, as_module(own))})


@pytest.mark.parametrize(
    ("state", "why"),
    [
        (MlpV1().state_dict(), r"version 1 \(ReLU\)"),
        (attention_head(), "attention head"),
        ({**head(192, 5), "pre_norm.0.weight": torch.ones(192)}, "begins with a norm"),
        ({"strange.weight": torch.ones(2)}, r"unknown \(strange\.weight"),
    ],
)
def test_heads_that_cannot_be_held_are_left_out_with_the_reason(
    state: State, why: str, tmp_path: Path
) -> None:
    heads = {"_heads.clip": head(192, 5), "_feature_projections.clip": state}
    path = write_pth(tmp_path / "v4.pth.tar", heads)
    folder = radio.fuse(path, tmp_path / "encoder")
    for source in (path, folder):
        encoder = radio.load(source)
        assert encoder.feature_names == ("summary", "features", "clip:summary")
        with pytest.raises(RadioError, match=rf"cannot give 'clip:features': .*{why}"):
            encoder.encode(photographs(1), "clip:features")
    assert "The head clip:features is left out" in (folder / "README.md").read_text()


def spread(values: torch.Tensor, factor: int, grid: tuple[int, int]) -> torch.Tensor:
    """Place each output by itself, as `b (h w) (u1 u2 c) -> b (h u1 w u2) c` of upstream says."""
    (rows, columns), channels = grid, values.shape[2] // factor**2
    fine = values.new_zeros(len(values), rows * factor, columns * factor, channels)
    for row in range(rows):
        for column in range(columns):
            for one in range(factor):
                for two in range(factor):
                    start = (one * factor + two) * channels
                    part = values[:, row * columns + column, start : start + channels]
                    fine[:, row * factor + one, column * factor + two] = part
    return fine.flatten(1, 2)


@pytest.mark.parametrize("factor", [2, 3])
def test_a_head_that_makes_more_positions_is_read(factor: int, tmp_path: Path) -> None:
    teachers = [teacher("clip", fd_upsample_factor=factor), *THREE[1:]]
    features = head(192, 5 * factor**2, 3, 1)
    heads = {"_heads.clip": head(192, 6), "_feature_projections.clip": features}
    path = write_pth(tmp_path / "v4.pth.tar", heads, teachers)
    images = photographs(2, 48, 64)
    with torch.no_grad():
        patches = backbone().eval()(images).features.flatten(2).transpose(1, 2)
        expected = spread(as_module(features)(patches), factor, (3, 4))
    for source in (path, radio.fuse(path, tmp_path / "encoder")):
        encoder = radio.load(source)
        assert encoder.upsample["clip"] == factor and encoder.feature_dims["clip:features"] == 5
        found = encoder.encode(images, "clip:features")["clip:features"]
        assert rms_error(found, expected) < 5e-6


def test_outputs_that_are_no_whole_positions_are_left_out(tmp_path: Path) -> None:
    teachers = [teacher("clip", fd_upsample_factor=2), *THREE[1:]]
    heads = {"_heads.clip": head(192, 5), "_feature_projections.clip": head(192, 21)}
    encoder = radio.load(write_pth(tmp_path / "v4.pth.tar", heads, teachers))
    with pytest.raises(RadioError, match="its 21 outputs are no 2 x 2 positions of each patch"):
        encoder.encode(photographs(1), "clip:features")
    assert "clip:summary" in encoder.feature_names


@pytest.mark.parametrize(
    ("label", "windows"),
    [
        ("radio_v2.pth.tar", {"num_windowed": 5}),
        ("radio_v2.1_bf16.pth.tar", {"num_windowed": 5}),
        ("radio_v2.5-b_half.pth.tar", {}),
        ("c-radio_v2-vlm-h_half.pth.tar", {"num_global": 8}),
        ("c-radio_v2-h.pth.tar", {}),
        ("e-radio_v2.pth.tar", {}),
        ("c-radio_v4-h", {}),
        ("None", {}),
    ],
)
def test_which_blocks_of_a_checkpoint_are_windowed(label: str, windows: dict[str, int]) -> None:
    assert windows_of(label) == windows


def test_the_windows_of_a_checkpoint_reach_the_backbone(tmp_path: Path) -> None:
    weights = read_weights(write_pth(tmp_path / "radio_v2.1.pth.tar"))
    assert (weights.num_windowed, weights.num_global) == (5, 4)
    folder = radio.fuse(tmp_path / "radio_v2.1.pth.tar", tmp_path / "encoder")
    assert read_weights(folder).num_windowed == 5


def test_a_checkpoint_says_which_text_tower_goes_with_it(tmp_path: Path) -> None:
    teachers = [
        teacher("clip", pretrained="dfn5b"),
        teacher("siglip2-g", "siglip2", model="siglip2-g-384"),
        teacher("dino", "dino_v2"),
    ]
    heads = {f"_heads.{name}": head(192, 5) for name in ("clip", "siglip2-g", "dino")}
    found = read_weights(write_pth(tmp_path / "v4.pth.tar", heads, teachers)).teachers
    assert found["clip"].facts == {
        "kind": "open_clip", "options": {"model": "clip-model"}, "pretrained": "dfn5b",
    }  # fmt: skip
    assert found["siglip2-g"].facts["pretrained"] == "google/siglip2-giant-opt-patch16-384"
    encoder = radio.load(tmp_path / "v4.pth.tar")
    with pytest.raises(RadioError, match=r"'dino' has no text tower.*: clip, siglip2-g"):
        encoder.encode_text("a cat", "dino")
    with pytest.raises(RadioError, match="open_clip has no model 'clip-model'"):
        encoder.encode_text("a cat")


# teachers, slots, rows


def test_duplicate_names_are_one_teacher_with_the_first_entry_s_head(tmp_path: Path) -> None:
    """One entry per partition; upstream takes the first of a name, and its number's heads."""
    teachers = [
        teacher("clip", token_slot=0),
        teacher("clip", token_slot=0),
        teacher("dino", token_slot=1),
        teacher("dino", token_slot=1),
        teacher("sam", token_slot=2, use_summary=False),
    ]
    first, dino = head(192, 5, 2, 1), head(192, 6, 2, 2)
    heads = {"_heads.0": first, "_heads.1": head(192, 7), "_heads.2": dino}
    heads |= {"_feature_projections.4": head(192, 8, 2, 3)}
    path = write_pth(tmp_path / "c-radio_v4.pth.tar", heads, teachers)
    with pytest.raises(RadioError, match=r"'summary' reads the CLS rows \[0, 2\]") as _:
        # The hub counts entries, not names: upstream reads past the CLS rows too, and fails.
        radio.load(write_pth(path, heads, teachers[:4], backbone(2)))
    encoder = radio.load(write_pth(path, heads, teachers))
    assert encoder.summary_rows == [0, 2]
    assert encoder.feature_names[2:] == ("clip:summary", "dino:summary", "sam:features")
    model = backbone()
    numbers(
        encoder,
        model,
        {"clip:summary": (0, as_module(first)), "dino:summary": (1, as_module(dino))},
    )


def test_a_token_slot_is_the_row_that_a_head_reads(tmp_path: Path) -> None:
    teachers = [teacher("clip", token_slot=2), teacher("dino", token_slot=0), teacher("sam")]
    heads = {"_heads.clip": head(192, 5, 2, 1), "_heads.dino": head(192, 6, 2, 2)}
    encoder = radio.load(write_pth(tmp_path / "v4.pth.tar", heads, teachers))
    assert encoder.cls_rows == {"clip": 2, "dino": 0, "sam": 2}
    rows = {"clip:summary": (2, as_module(heads["_heads.clip"]))}
    rows["dino:summary"] = (0, as_module(heads["_heads.dino"]))
    numbers(encoder, backbone(), rows)
    assert encoder.summary_rows == [0, 1, 2]


def test_a_slot_beyond_the_names_makes_more_rows_as_upstream_does(tmp_path: Path) -> None:
    teachers = [teacher("clip"), teacher("dino", token_slot=4)]
    heads = {"_heads.dino": head(192, 6, 2, 2)}
    path = write_pth(tmp_path / "v4.pth.tar", heads, teachers)
    weights = read_weights(path)
    assert (weights.num_cls, weights.num_registers) == (5, 3)
    five = VisionTransformer(SHAPE, image_size=64, num_cls=5, num_registers=3)
    five.load_state_dict(backbone().state_dict())
    numbers(radio.load(path), five, {"dino:summary": (4, as_module(heads["_heads.dino"]))})
    teachers[1]["token_slot"] = 8  # that is a patch
    with pytest.raises(RadioError, match="8 prefix tokens, of which 9"):
        radio.load(write_pth(path, heads, teachers))


def test_teachers_without_a_summary_have_no_row_in_it(tmp_path: Path) -> None:
    teachers = [teacher("sam", use_summary=False), teacher("clip"), teacher("dino")]
    encoder = radio.load(write_pth(tmp_path / "v4.pth.tar", teachers=teachers))
    assert encoder.summary_rows == [1, 2]
    images = photographs(1)
    with torch.no_grad():
        expected = backbone()(images).cls[:, [1, 2]].flatten(1)
    assert rms_error(encoder.encode(images)["summary"], expected) < 1e-6


def test_one_shared_cls_row(tmp_path: Path) -> None:
    teachers = [teacher("clip"), teacher("dino", token_slot=1)]
    heads = {"_heads.dino": head(192, 6)}
    path = write_pth(
        tmp_path / "v4.pth.tar", heads, teachers, backbone(1), cls_token_per_teacher=False
    )
    encoder = radio.load(path)
    assert encoder.summary_rows == [0] and encoder.cls_rows == {"clip": 0, "dino": 0}
    numbers(encoder, backbone(1), {"dino:summary": (0, as_module(heads["_heads.dino"]))})


@pytest.mark.parametrize(
    ("label", "names", "aligned"),
    [
        ("radio_v2.5-h.pth.tar", [("clip", "open_clip"), ("dino_v2", "dino_v2")], True),
        ("radio_v2.5-b_half.pth.tar", [("sam", "sam")], True),
        ("c-radio_v2-vlm-h", [("siglip", "open_clip")], True),
        ("c-radio_v3-b", [("clip", "open_clip")], False),
        ("c-radio_v4-h", [("siglip2-g", "siglip2")], False),
        ("radio_v1", [("siglip2-g", "siglip2")], False),
        ("model.pth.tar", [("x", "dino_v3")], False),
        ("model.pth.tar", [("dino_v3_7b", "hf")], False),
        ("model.pth.tar", [("sam3", "sam3")], False),
        ("model.pth.tar", [("sam", "sam"), ("dino_v2", "dino_v2")], True),
        ("None", [("clip", "open_clip")], True),
    ],
)
def test_which_checkpoints_resized_with_aligned_corners(
    label: str, names: list[tuple[str, str]], aligned: bool
) -> None:
    assert published_with_aligned_corners(label, [teacher(*name) for name in names]) is aligned


def test_aligned_corners_survive_the_folder(tmp_path: Path) -> None:
    old = [teacher("clip"), teacher("dino_v2"), teacher("sam")]
    path = write_pth(tmp_path / "radio_v2.5-b.pth.tar", teachers=old)
    first, again = radio.load(path), radio.load(radio.fuse(path, tmp_path / "encoder"))
    assert first.align_corners and again.align_corners
    images = photographs(1, 96, 96)  # larger than the table
    expected = first.encode(images)["features"]
    assert torch.equal(again.encode(images)["features"], expected)
    newer = radio.load(shutil.copy(path, tmp_path / "c-radio_v3-b.pth.tar"))
    assert not torch.allclose(newer.encode(images)["features"], expected, atol=1e-3)


def test_spectral_weights_are_materialised_with_the_run_s_eps(tmp_path: Path) -> None:
    model = backbone()
    state = hub_state(model, {})
    key = "base_model.blocks.0.attn.proj"
    weight = state.pop(f"{key}.weight")
    right = torch.nn.functional.normalize(torch.ones(192), dim=0)
    left = torch.nn.functional.normalize(weight @ right, dim=0)
    sigma = float((weight @ right).norm())
    factor = {"scale": torch.tensor([[2.0]]), "_u": left, "_v": right}
    prefix = f"{key}.parametrizations.weight."
    state |= {f"{prefix}original": weight, **under(f"{prefix}0.", factor)}
    for option, eps in ((True, 1e-6), ({"eps": 0.5}, 0.5), ({}, 1e-12)):
        args = argparse.Namespace(teachers=THREE, spectral_reparam=option)
        torch.save({"state_dict": state, "args": args}, tmp_path / "v4.pth")
        found = read_weights(tmp_path / "v4.pth").backbone["blocks.0.attn.proj.weight"]
        torch.testing.assert_close(found, weight * 2 / (sigma + eps), rtol=1e-5, atol=1e-6)


# what is refused


class Payload:
    def __reduce__(self) -> tuple[Any, ...]:
        return (print, ("unpickled",))


def test_pickled_code_never_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = argparse.Namespace(teachers=THREE, hook=Payload())
    torch.save({"state_dict": {}, "args": args}, tmp_path / "code.pth.tar")
    with pytest.raises(RadioError, match=r"code\.pth\.tar.*cannot|can be read safely"):
        radio.load(tmp_path / "code.pth.tar")
    with pytest.raises(RadioError, match=r"argparse\.Namespace only"):
        radio.fuse(tmp_path / "code.pth.tar", tmp_path / "encoder")
    assert capsys.readouterr().out == ""
    assert argparse.Namespace not in torch.serialization.get_safe_globals()


def test_files_of_something_else_are_refused(tmp_path: Path) -> None:
    whole = write_pth(tmp_path / "whole.pth.tar").read_bytes()
    safe = tmp_path / "model.safetensors"
    save_file({"a": torch.zeros(2)}, safe)
    legacy = tmp_path / "legacy"  # before torch wrote zips: one bare pickle after the other
    torch.save({"a": torch.ones(2)}, legacy, _use_new_zipfile_serialization=False)
    rubbish = {
        "empty": b"",
        "text": b"not a checkpoint at all",
        "json": b'{"a": 1}',
        "picture": png(),
        "zeros": bytes(5000),
        "pickle": b"\x80\x02}q\x00.",
        "safetensors": safe.read_bytes(),
        "legacy": legacy.read_bytes().replace(b"FloatStorage", b"\xf1loatStorage"),
        "zip": b"PK\x03\x04" + bytes(100),
        **{f"cut{length}": whole[:length] for length in (1, 50, len(whole) // 2, len(whole) - 9)},
    }
    for name, data in rubbish.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(RadioError, match=rf"{name} is no checkpoint of NVIDIA's"):
            radio.load(tmp_path / name)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"model": {}}, r"expected state_dict.*found \['model'\]"),
        ([1, 2], "found list"),
        ({"state_dict": {}}, "expected state_dict"),
        ({"state_dict": {}, "args": {"teachers": THREE}}, "and args, found"),
        ({"state_dict": {}, "args": argparse.Namespace(lr=1)}, "args name no teachers"),
        ({"state_dict": {}, "args": argparse.Namespace(teachers=THREE)}, "embedder.weight"),
        ({1: 2, "state": 3}, "expected state_dict"),
    ],
)
def test_other_checkpoints_are_refused(content: Any, words: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "other.pth")
    with pytest.raises(RadioError, match=words):
        radio.load(tmp_path / "other.pth")


def test_backbones_that_we_cannot_hold_are_refused(tmp_path: Path) -> None:
    for extra, words in (
        ({"base_model.norm.weight": torch.ones(192)}, "a final norm"),
        ({"base_model.blocks.0.mlp.norm.weight": torch.ones(1)}, r"C-RADIO v1"),
        ({"_feature_normalizer.mean": torch.ones(1)}, r"v4\.pth holds a feature normalizer"),
        ({"base_model.patch_generator.embedder.weight": torch.ones(100, 768)}, "100 wide"),
    ):
        state = {**hub_state(backbone(), {}), **extra}
        args = argparse.Namespace(teachers=THREE)
        torch.save({"state_dict": state, "args": args}, tmp_path / "v4.pth")
        with pytest.raises(RadioError, match=words):
            radio.load(tmp_path / "v4.pth")


# the folder of remote code


def write_remote(
    folder: Path, heads: Mapping[str, State] | None = None, **changes: Any
) -> tuple[Path, VisionTransformer]:
    model = backbone(layer_scale=0.4)
    state: State = {"radio_model.summary_idxs": torch.tensor([0, 2])}
    for key, value in model.state_dict().items():
        below = "" if key.startswith("input_conditioner") else "model."
        state[f"radio_model.{below}{key.replace('gamma', 'grandma')}"] = value.contiguous()
    for prefix, values in (heads or {}).items():
        state |= under(f"radio_model.adaptors.{prefix}.", values)
    state |= changes.pop("tensors", {})
    folder.mkdir()
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    config = {
        "architectures": ["RADIOModel"],
        "auto_map": {"AutoModel": "hf_model.RADIOModel"},
        "version": "c-radio_v3-b",
        "patch_size": 16,
        "args": {"teachers": THREE, "cls_token_per_teacher": True},
        "adaptor_configs": {},
        **changes,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder, model


def test_a_folder_of_remote_code_runs_without_it(tmp_path: Path) -> None:
    (tmp_path / "bait").mkdir()
    folder, model = write_remote(tmp_path / "remote")
    (folder / "hf_model.py").write_text("raise SystemExit('remote code ran')")
    encoder = radio.load(folder)
    assert encoder.feature_names == ("summary", "features")
    assert encoder.summary_rows == [0, 2] and not encoder.align_corners
    numbers(encoder, model, {})
    with pytest.raises(RadioError, match="no encoder folder"):
        radio.fuse(folder, folder)
    fused = radio.fuse(folder, tmp_path / "fused")
    numbers(radio.load(fused), model, {})


def test_heads_of_a_remote_folder(tmp_path: Path) -> None:
    heads = {
        "clip.head_mlp": head(192, 5, 2, 1),
        "clip.feat_mlp": head(192, 6, 3, 2),
        "clip2.head_mlp": head(192, 7, 2, 3),
        "clip2.feat_mlp": attention_head(),
    }
    plain = {"feature": {"upsample_factor": 1}, "summary": {}}
    configs = {"clip": {**plain, "head_idx": 2}, "clip2": {**plain, "head_idx": 1}}
    folder, model = write_remote(tmp_path / "remote", heads, adaptor_configs=configs)
    encoder = radio.load(folder)
    rows: dict[str, tuple[int | None, nn.Module]] = {
        "clip:summary": (2, as_module(heads["clip.head_mlp"])),
        "clip:features": (None, as_module(heads["clip.feat_mlp"])),
        "clip2:summary": (1, as_module(heads["clip2.head_mlp"])),
    }
    assert encoder.feature_names[2:] == tuple(rows)
    numbers(encoder, model, rows)
    with pytest.raises(RadioError, match=r"clip2:features': it is an attention head"):
        encoder.encode(photographs(1), "clip2:features")


def test_an_old_remote_folder_resizes_with_aligned_corners(tmp_path: Path) -> None:
    old = {"teachers": [teacher("clip"), teacher("dino_v2"), teacher("sam")]}
    folder, _ = write_remote(tmp_path / "remote", version="radio_v2.5-b", args=old)
    assert radio.load(folder).align_corners


def test_remote_folders_of_something_else_are_refused(tmp_path: Path) -> None:
    folder, _ = write_remote(tmp_path / "nameless", args={"lr": 1})
    with pytest.raises(RadioError, match="args name no teachers"):
        radio.load(folder)
    normal = {"radio_model.feature_normalizer.mean": torch.ones(1)}
    folder, _ = write_remote(tmp_path / "normal", tensors=normal)
    with pytest.raises(RadioError, match="feature normalizer"):
        radio.load(folder)
    extra = {"radio_model.model.norm.weight": torch.ones(192)}
    folder, _ = write_remote(tmp_path / "normed", tensors=extra)
    with pytest.raises(RadioError, match="a final norm"):
        radio.load(folder)
