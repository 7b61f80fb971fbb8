"""View mode `sharpened` by a file: real exported programs, and what is no such thing."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest
import torch
from test_distill import losses_of
from tiny import tiny_config
from torch import Tensor, nn

from radio.checks import check
from radio.config import Config
from radio.data.configured import training_plan
from radio.encoder.fuse import weights_of
from radio.encoder.same_teacher import check_teacher
from radio.errors import RadioError
from radio.targets.stream import LocalStream
from radio.targets.target_maker import Request
from radio.targets.upsampler import FileUpsampler
from radio.training.checkpoint import find_checkpoint
from radio.training.distill import distill

pytestmark = pytest.mark.usefixtures("no_report")
CPU = torch.device("cpu")


class Finer(nn.Module):
    """Twice the grid, from the features and the picture itself."""

    def __init__(self) -> None:
        super().__init__()
        self.spread = nn.Conv2d(8, 32, 1)
        self.light = nn.Conv2d(3, 8, 16, 16)

    def forward(self, features: Tensor, pixels: Tensor) -> Tensor:
        return nn.functional.pixel_shuffle(self.spread(features), 2) + self.light(pixels)


@pytest.fixture(scope="module")
def finer() -> Finer:
    torch.manual_seed(0)
    return Finer().eval().requires_grad_(False)


@pytest.fixture(scope="module")
def file(finer: Finer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Export for the tiny run's teacher `words`: 2 x 2 positions of a 64 px view."""
    path = tmp_path_factory.mktemp("upsampler") / "finer.pt2"
    batch = torch.export.Dim("batch")
    example = torch.randn(2, 8, 2, 2), torch.randn(2, 3, 64, 64)
    program = torch.export.export(finer, example, dynamic_shapes=({0: batch}, {0: batch}))
    torch.export.save(program, path)
    return path


def sharpened(root: Path, file: Path) -> Config:
    config = tiny_config(root, steps=2)
    config.teachers["words"].upsampler = str(file)
    config.stages[0].partitions["high"].views["words"] = "sharpened"
    check(config)
    return config


def test_a_files_upsampler_is_the_module(finer: Finer, file: Path) -> None:
    features, pixels = torch.randn(3, 8, 2, 2), torch.randn(3, 3, 64, 64)
    assert torch.equal(FileUpsampler(str(file), CPU)(features, pixels), finer(features, pixels))


def test_targets_of_a_run_come_out_of_the_file(finer: Finer, file: Path, tmp_path: Path) -> None:
    config = sharpened(tmp_path, file)
    plan, request = training_plan(config, 24), Request("train", "float32", {})
    with LocalStream(config) as stream:
        spec = plan(0).partitions[1]
        target = stream.makers["words"](spec, request)
        maker = stream.makers["words"]
        views = maker.readers["train"].batch(spec.views, 64)
        pixels = maker._normalise(views.pixels)
        expected = finer(maker.teacher(pixels).features, pixels)
        assert torch.equal(torch.from_numpy(target.features), expected)
        with_file = stream.teachers["words"].fingerprint
    config.teachers["words"].upsampler = None
    with LocalStream(config) as stream:
        assert stream.teachers["words"].fingerprint != with_file
        bicubic = stream.makers["words"](spec, request)
    assert not torch.equal(torch.from_numpy(bicubic.features), expected)


def test_a_run_trains_on_sharpened_features(file: Path, tmp_path: Path) -> None:
    run = distill(sharpened(tmp_path, file)).out
    assert len(losses_of(run)) == 2
    facts = {name: heads.facts for name, heads in weights_of(find_checkpoint(run)).teachers.items()}
    for name in ("words", "parts"):  # with the file and without
        check_teacher(name, facts[name], "it")
        with pytest.raises(RadioError, match="other weights than when it was"):
            check_teacher(name, {**facts[name], "seed": 9}, "it")


def test_files_that_would_run_code_are_refused(file: Path, tmp_path: Path) -> None:
    with pytest.raises(RadioError, match="there is no upsampler file"):
        FileUpsampler(str(tmp_path / "none.pt2"), CPU)
    wrong = tmp_path / "wrong.pt2"
    wrong.write_bytes(b"no archive")
    with pytest.raises(RadioError, match=r"no \.pt2 archive"):
        FileUpsampler(str(wrong), CPU)
    for name, content in {
        "x/data/weights/model_weights_config.json": b'{"config":{"a":{"use_pickle":true}}}',
        "x/data/constants/custom_obj_0": b"",
        "x/data/sample_inputs/model.pt": b"cbuiltins\nprint\n(S'ran'\ntR.",
    }.items():
        with zipfile.ZipFile(wrong, "w") as archive:
            archive.writestr(name, content)
        with pytest.raises(RadioError, match="running its code"):
            FileUpsampler(str(wrong), CPU)
    with zipfile.ZipFile(wrong, "w") as archive:
        archive.writestr("x/data/readme", "empty")
    with pytest.raises(RadioError, match="no exported program"):
        FileUpsampler(str(wrong), CPU)


def test_another_teachers_upsampler_is_said(file: Path) -> None:
    with pytest.raises(RadioError, match="does not take features"):
        FileUpsampler(str(file), CPU)(torch.randn(2, 9, 2, 2), torch.randn(2, 3, 64, 64))
