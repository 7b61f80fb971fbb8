"""The backbone started from encoders, judged by transformers' RadioModel of the same folder."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_encoder import SIZES_PX, seeded_radio_model, write_small
from test_student import DIMS, SMALL, rms_error, small_vit
from transformers import RadioModel

import radio
from radio.encoder.layout import clean_backbone
from student import vit
from student.model import TeacherDims, build_student
from student.vit import VisionTransformer, VitShape
from student.warm_start import warm_start


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small(tmp_path_factory.mktemp("warm") / "encoder")


@pytest.fixture
def broken(folder: Path, tmp_path: Path) -> Path:
    """Return a copy that a test may change."""
    return Path(shutil.copytree(folder, tmp_path / "encoder"))


def started(source: Path, **options: Any) -> VisionTransformer:
    """Return a backbone of other weights, started from `source`."""
    settings = {"image_size": 128, "num_cls": 3, "num_registers": 5, **options}
    torch.manual_seed(9)
    model = VisionTransformer(settings.pop("shape", SMALL), **settings)
    warm_start(model, source)
    return model.eval()


def same_features(model: VisionTransformer, folder: Path, sizes: list[tuple[int, int]]) -> None:
    judge = RadioModel.from_pretrained(folder).eval()
    for size in sizes:
        images = torch.rand(2, 3, *size)
        with torch.no_grad():
            expected, found = judge(pixel_values=images), model(images)
        features = found.features.flatten(2).transpose(1, 2)
        assert rms_error(features, expected.features) < 1e-6, size
        assert features.std() > 0.1


@pytest.mark.parametrize("layer_scale", [None, 0.5])
def test_an_encoder_folder_starts_the_same_features(
    folder: Path, layer_scale: float | None
) -> None:
    """With LayerScale in the student too: what the folder has folded stays folded."""
    model = started(folder, layer_scale=layer_scale)
    same_features(model, folder, SIZES_PX)
    judge = RadioModel.from_pretrained(folder).eval()
    images = torch.rand(1, 3, 64, 96)
    with torch.no_grad():
        summary = model(images).cls[:, [0, 2]].flatten(1)
        assert rms_error(summary, judge(pixel_values=images).summary) < 1e-6
    if layer_scale is not None:
        assert (model.blocks[1].ls2.gamma == 1).all()


def test_one_file_of_the_folder_is_enough(folder: Path) -> None:
    found, expected = started(folder / "model.safetensors"), started(folder)
    assert all(map(torch.equal, found.state_dict().values(), expected.state_dict().values()))


@pytest.mark.parametrize("shard", ["5GB", "200KB"])
def test_what_radiomodel_saves_itself(tmp_path: Path, shard: str) -> None:
    """Its files have LayerScale's identities, another normalisation, and may be several."""
    folder = tmp_path / "native"
    seeded_radio_model().save_pretrained(folder, max_shard_size=shard)
    assert (len(list(folder.glob("model*.safetensors"))) > 1) is (shard == "200KB")
    model = started(folder, shape=VitShape(48, 3, 3, 192))
    same_features(model, folder, SIZES_PX[1:4])
    torch.testing.assert_close(
        model.input_conditioner.norm_std.flatten(), torch.tensor([0.2, 0.3, 0.4])
    )


def write_hub(path: Path, options: dict[str, float] | bool = False, **extra: Any) -> Path:
    """Write NVIDIA's hub layout, LayerScale unfolded and one weight under a spectral factor."""
    state = small_vit(layer_scale=0.3).state_dict()
    key = "blocks.0.mlp.fc1"
    weight = state.pop(f"{key}.weight")
    right = torch.nn.functional.normalize(torch.ones(weight.shape[1]), dim=0)
    left = torch.nn.functional.normalize(weight @ right, dim=0)
    factor = {"scale": torch.full((1, 1), 2.0), "_u": left, "_v": right}
    prefix = f"{key}.parametrizations.weight."
    state |= {f"{prefix}original": weight, **{f"{prefix}0.{k}": v for k, v in factor.items()}}
    hub = {
        f"module.{'' if name.startswith('input_') else 'base_model.'}{name}": value
        for name, value in state.items()
    }
    hub["module._heads.0.fc1.weight"] = torch.zeros(2, 2)
    args = argparse.Namespace(teachers=[{"name": "clip"}], spectral_reparam=options)
    torch.save({"state_dict": hub, "args": args, **extra}, path)
    return path


@pytest.mark.parametrize(("options", "eps"), [(False, 1e-6), ({"eps": 0.5}, 0.5), ({}, 1e-12)])
def test_nvidias_pth_tar(tmp_path: Path, options: Any, eps: float) -> None:
    model = started(write_hub(tmp_path / "c-radio_v3-s.pth.tar", options))
    judge = small_vit(layer_scale=0.3)
    with torch.no_grad():
        weight = judge.blocks[0].mlp.fc1.weight
        sigma = float((weight @ torch.full((96,), 96**-0.5)).norm())
        weight.mul_(2 / (sigma + eps))
        for size in SIZES_PX[:4]:
            images = torch.rand(1, 3, *size)
            found, expected = model(images), judge(images)
            assert rms_error(found.features, expected.features) < 1e-6
            assert rms_error(found.cls, expected.cls) < 1e-6


def test_the_average_of_a_training_comes_first(tmp_path: Path) -> None:
    ema = {
        f"{'' if name.startswith('input_') else 'base_model.'}{name}": value + 1
        for name, value in small_vit().state_dict().items()
    }
    model = started(write_hub(tmp_path / "w.pth", state_dict_ema=ema))
    expected = small_vit().blocks[2].attn.proj.bias + 1
    assert torch.equal(model.blocks[2].attn.proj.bias, expected)


@pytest.mark.parametrize("side", [64, 96, 192])
def test_another_table_encodes_its_own_size_as_the_folder(folder: Path, side: int) -> None:
    model = started(folder, image_size=side)
    assert model.patch_generator.pos_embed.shape[1] == (side // 16) ** 2
    same_features(model, folder, [(side, side)])


def test_as_many_rows_in_all_leave_the_features(folder: Path) -> None:
    """The folder has 3 CLS rows and 5 registers; attention cannot tell them apart."""
    for num_cls in (1, 4):
        same_features(
            started(folder, num_cls=num_cls, num_registers=8 - num_cls), folder, [(64, 96)]
        )


def test_rows_beyond_the_folders_start_as_their_mean(folder: Path) -> None:
    theirs = clean_backbone(small_vit().state_dict())["patch_generator.cls_token.token"]
    token = started(folder, num_cls=9, num_registers=7).patch_generator.cls_token.token
    assert torch.equal(token[:8], theirs)
    torch.testing.assert_close(token[8:], theirs.mean(0).expand(8, -1))
    assert torch.equal(started(folder, num_registers=1).patch_generator.cls_token.token, theirs[:4])


def test_students_take_the_backbone_and_keep_their_adaptors(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(vit.SIZES, "pocket", SMALL)
    dims = {**DIMS, "more": TeacherDims(4, 4)}

    def student(init: str | None, **options: Any) -> Any:
        torch.manual_seed(2)
        settings = {"size": "pocket", "patch_size": 16, "image_size": 128, "dims": dims}
        return build_student(**settings, init=init, **options).eval()

    warm, cold = student(str(folder)), student(None)
    assert torch.equal(warm.adaptors["words"].features.last.weight,
                       cold.adaptors["words"].features.last.weight)  # fmt: skip
    same_features(warm.backbone, folder, [(64, 48)])
    images = torch.rand(1, 3, 64, 48)
    with torch.no_grad():  # factors start from the weights that were read
        found = student(str(folder), spectral=True).backbone(images).features
        assert rms_error(found, warm.backbone(images).features) < 1e-4


def test_the_loaded_encoder_and_the_started_student_agree(folder: Path) -> None:
    images = torch.rand(1, 3, 80, 48)
    with torch.no_grad():
        found = started(folder)(images).features.flatten(2).transpose(1, 2)
    assert rms_error(found, radio.load(folder).encode(images)["features"]) < 1e-6


@pytest.mark.parametrize(
    ("options", "own"),
    [
        ({"patch_size": 8}, "patch 8, width 96, depth 3, MLP 384, heads 3"),
        ({"shape": VitShape(48, 3, 3, 384)}, "patch 16, width 48"),
        ({"shape": VitShape(96, 2, 3, 384)}, "depth 2"),
        ({"shape": VitShape(96, 3, 3, 192)}, "MLP 192"),
        ({"shape": VitShape(96, 3, 6, 384)}, "heads 6"),
    ],
)
def test_another_vit_is_refused_with_both_named(
    folder: Path, options: dict[str, Any], own: str
) -> None:
    theirs = "patch 16, width 96, depth 3, MLP 384, heads 3"
    with pytest.raises(ValueError, match=rf"encoder has {theirs}; the student has .*{own}"):
        started(folder, **options)


def test_sources_that_start_nothing(broken: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    with pytest.raises(ValueError, match=r"no encoder folder.*found nothing"):
        started(run)
    (run / "config.json").write_text("{}")
    (run / "model.safetensors").write_bytes(b"half")
    with pytest.raises(ValueError, match="no whole safetensors file"):
        started(run)
    (run / "model.safetensors").write_bytes((broken / "adaptors.safetensors").read_bytes())
    with pytest.raises(ValueError, match=r"no RADIO backbone.*radio fuse"):
        started(run)
    with pytest.raises(FileNotFoundError, match=r"gone\.pth\.tar does not exist"):
        started(tmp_path / "gone.pth.tar")
    (tmp_path / "half.pth").write_bytes(write_hub(tmp_path / "w.pth").read_bytes()[:4000])
    with pytest.raises(ValueError, match="no whole weight file"):
        started(tmp_path / "half.pth")
    (broken / "config.json").write_text("[1")
    with pytest.raises(ValueError, match="no settings by name"):
        started(broken)


def test_a_folder_that_lost_a_weight_is_refused(broken: Path) -> None:
    tensors = load_file(broken / "model.safetensors")
    del tensors["radio_model.model.blocks.1.norm2.bias"]
    save_file(tensors, broken / "model.safetensors")
    with pytest.raises(ValueError, match=r"lacks blocks\.1\.norm2\.bias \(1 keys\)"):
        started(broken)
