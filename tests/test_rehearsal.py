from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from tiny import tiny_config, write_pictures

from radio.config import Config, StageConfig, load_teacher
from radio.errors import RadioError
from radio.targets.codec import encode
from radio.training.rehearsal import rehearse
from radio.training.rehearsal_config import alone, lowered, rehearsal_config
from radio.training.rehearsal_memory import (
    WORKING,
    draw_half,
    peak_bytes,
    reset_peak,
    room,
    without_weights,
)
from radio.training.rehearsal_report import Rehearsal, rehearsal_tables
from radio.training.rehearsal_teacher import one_forward
from teachers import Teacher, build_teacher, count_running


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """The tiny run with an earlier stage, a warm start and weights that nobody could read."""
    config = tiny_config(tmp_path_factory.mktemp("rehearsal"))
    config.stages[0].partitions["high"].image_sizes = [32, 64]
    config.stages[0].frozen_trunk_steps = config.stages[0].steps
    first = StageConfig(1, {"low": replace(config.stages[0].partitions["low"], batch=24)})
    config.stages.insert(0, first)
    config.student.size, config.student.init = "tiny", "no_such_vit"
    for teacher in config.teachers.values():
        teacher.pretrained = "no_such_weights"
    config.optimizer.ema_decay = 0.9
    config.threads.student = 1
    config.students["narrow"] = replace(config.student, adaptor_hidden=8)
    return config


@pytest.fixture(scope="module")
def result(config: Config) -> Rehearsal:
    return rehearse(config)


def test_a_teachers_row_is_what_its_network_is(config: Config, result: Rehearsal) -> None:
    for row in result.teachers:
        wanted = config.teachers[row.name]
        teacher = build_teacher(wanted.kind, row.name, wanted.options, None, 0)
        parameters = sum(weight.numel() for weight in teacher.parameters())
        assert row.parameters_m == pytest.approx(parameters / 1e6)
        assert row.precision == "float32" and row.skipped is None
        assert row.fit_positions >= row.channels == teacher.feature_dim


def test_targets_and_the_bytes_that_carry_them(result: Rehearsal) -> None:
    assert dict(result.views) == {"low": (2, 32, 32), "high": (2, 64, 64)}
    grids = {
        "words": {"low": (2, 2), "high": (2, 2)},  # native: 64 px of stride 32
        "parts": {"low": (2, 2), "high": (4, 4)},  # the student's own
        "edges": {"low": (2, 2), "high": (4, 4)},
    }
    dims = {"words": (12, 8), "parts": (6, 7), "edges": (None, 10)}
    for row in result.teachers:
        assert row.targets is not None
        summary, channels = dims[row.name]
        for name, target in row.targets.items():
            shape = (2, channels, *grids[row.name][name])
            assert tuple(target.features) == shape
            tensors = [torch.zeros(shape)]
            if summary is None:
                assert target.summary is None
            else:
                assert target.summary is not None and tuple(target.summary) == (2, summary)
                tensors.append(torch.zeros(2, summary))
            valid = 2 * shape[2] * shape[3]
            coded = sum(encode(tensor, "bf16").nbytes for tensor in tensors)
            assert target.bytes_shipped == coded + valid


def test_every_student_took_a_step(result: Rehearsal) -> None:
    first, second = result.students
    assert (first.name, second.name) == ("", "narrow")
    assert second.parameters_m < first.parameters_m and first.losses != second.losses
    assert second.losses is not None and first.losses is not None
    assert second.losses.keys() == first.losses.keys()


def test_the_student_took_a_step(result: Rehearsal) -> None:
    student = result.students[0]
    # A ViT-Ti has 5.5 M of them with its classifier and positions of 224 px.
    assert 5.3 < student.backbone_parameters_m < student.parameters_m < 5.7
    assert student.losses is not None and student.step_seconds > 0
    assert set(student.losses) == {
        "words/summary", "words/features", "parts/summary", "parts/features", "edges/features",
    }  # fmt: skip


def test_only_the_json_stays(config: Config, result: Rehearsal) -> None:
    out = Path(config.out)
    assert [path.name for path in out.iterdir()] == ["rehearsal.json"]
    written = json.loads((out / "rehearsal.json").read_text())
    assert written["students"][0]["parameters_m"] == result.students[0].parameters_m
    for row, found in zip(result.teachers, written["teachers"], strict=True):
        assert found["name"] == row.name and found["bytes_shipped"] == row.bytes_shipped > 0
    shown = printed(result)
    for row in result.teachers:
        assert row.name in shown and f"{row.fit_positions} x {row.channels}" in shown
    assert "parts/features" in shown and "left out" not in shown


def printed(result: Rehearsal) -> str:
    console = Console(file=io.StringIO(), width=240)
    for table in rehearsal_tables(result):
        console.print(table)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def with_card(config: Config, out: Path, **parameters_m: float) -> Config:
    """Return the run with cards that say another number of parameters, in millions."""
    teachers = dict(config.teachers)
    for name, millions in parameters_m.items():
        card = replace(teachers[name].card, parameters_m=millions)
        teachers[name] = replace(teachers[name], card=card)
    return replace(config, out=str(out), teachers=teachers, students={})


def test_a_teacher_without_room_is_halved_or_left_out(config: Config, tmp_path: Path) -> None:
    half_fits = (room() - WORKING) / 3 / 1e6  # of 2 or 4 bytes
    result = rehearse(with_card(config, tmp_path, words=half_fits, parts=1e6))
    halved, left, whole = result.teachers
    assert (halved.precision, halved.skipped) == ("bfloat16", None)
    assert (whole.precision, whole.skipped) == ("float32", None)
    assert left.skipped is not None
    assert f"needs {(2e12 + WORKING) / 1e9:,.1f} GB in bfloat16" in left.skipped
    assert left.skipped in printed(result)
    assert left.targets is None and left.parameters_m == 0
    # The student is as large as with all its teachers, and learns from those that there are.
    assert result.students[0].losses is not None
    assert {name.split("/")[0] for name in result.students[0].losses} == {"words", "edges"}
    assert result.students[0].parameters_m > 5.3
    assert json.loads((tmp_path / "rehearsal.json").read_text())["teachers"][1]["skipped"]


def test_no_room_at_all_is_an_error(config: Config, tmp_path: Path) -> None:
    with pytest.raises(RadioError, match="no teacher fits into the memory"):
        rehearse(replace(config, out=str(tmp_path)), budget=WORKING)
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_no_room_for_the_student_is_said(config: Config, result: Rehearsal, tmp_path: Path) -> None:
    taken = -room(0)  # after a first rehearsal, so that every library is there
    student = replace(config.student, size="small")  # 22 M weights learn with 264 MB
    budget = taken + WORKING + 200 * 10**6
    optimizer = replace(config.optimizer, ema_decay=None)
    larger = replace(config, student=student, students={}, optimizer=optimizer)
    small = rehearse(replace(larger, out=str(tmp_path)), budget)
    assert [row.skipped for row in small.teachers] == [None] * 3
    assert small.students[0].skipped is not None and small.students[0].losses is None
    assert small.students[0].skipped in printed(small)


def dinov3() -> Teacher:
    shape = {"embed_dim": 64, "num_heads": 2, "depth": 2}
    options = {"model": "vit_small_patch16_dinov3", "native_size": 64, **shape}
    return build_teacher("dinov2", "parts", options, None, 0)


def test_a_bfloat16_teacher_is_the_same_network() -> None:
    wide = dinov3()
    with without_weights():
        empty = dinov3()
    assert all(weight.is_meta for weight in empty.parameters())
    half = draw_half(empty, seed=3)
    assert {n: w.shape for n, w in half.named_parameters()} == {
        n: w.shape for n, w in wide.named_parameters()
    }
    assert {weight.dtype for weight in half.parameters()} == {torch.bfloat16}
    for (name, ours), (_, theirs) in zip(half.named_buffers(), wide.named_buffers(), strict=True):
        assert torch.equal(ours, theirs), name  # rotary periods are no weights
    # The same weights in float32 say the same up to bfloat16's rounding.
    wide.load_state_dict({name: weight.float() for name, weight in half.state_dict().items()})
    pixels = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    ours, theirs = half(pixels), wide(pixels)
    assert ours.features.dtype == torch.bfloat16
    error = (ours.features.float() - theirs.features).square().mean()
    assert error < 1e-3 * theirs.features.var()


def test_modules_built_afterwards_have_weights_again() -> None:
    with without_weights():
        pass
    assert not torch.nn.Linear(2, 2).weight.is_meta


def clip() -> Teacher:
    card = load_teacher("demo_clip")
    return build_teacher(card.kind, "words", dict(card.options), None, 0)


@pytest.mark.parametrize("build", [dinov3, clip])
def test_flop_are_those_that_the_meta_device_counts(build: Callable[[], Teacher]) -> None:
    with torch.device("meta"):
        _, expected = count_running(build())  # plain kernels there, fused ones here
    found, seconds = one_forward(build())
    assert found == pytest.approx(expected, rel=1e-6) and seconds > 0
    assert torch.backends.mha.get_fastpath_enabled()


def test_the_peak_is_measured_anew() -> None:
    reset_peak()
    before = peak_bytes()
    memory = torch.ones(256 << 20, dtype=torch.uint8)
    assert peak_bytes() > before + (128 << 20)  # other threads may have freed some in the meantime
    del memory
    high = peak_bytes()
    reset_peak()
    assert peak_bytes() < high
    assert room(10**15) < 10**15 and room(0) < 0


@pytest.mark.parametrize(("pictures", "batch"), [(2, 1), (3, 1), (4, 2), (9, 2)])
def test_the_batch_follows_the_pictures(
    config: Config, tmp_path: Path, pictures: int, batch: int
) -> None:
    train = write_pictures(tmp_path / "few", pictures)
    small = lowered(replace(config, data=replace(config.data, train=str(train))), tmp_path)
    (stage,) = small.stages
    assert {partition.batch for partition in stage.partitions.values()} == {batch}
    assert (stage.steps, stage.frozen_trunk_steps) == (1, 0)
    assert stage.partitions["high"].image_size == 64 and not stage.partitions["high"].image_sizes


def test_many_partitions_have_a_view_each(config: Config, tmp_path: Path) -> None:
    (low, high), last = config.stages[-1].partitions.values(), config.stages[-1]
    stage = replace(last, partitions={"a": low, "b": high, "c": low})
    (small,) = lowered(replace(config, stages=[stage]), tmp_path).stages
    assert [partition.batch for partition in small.partitions.values()] == [1, 1, 1]


def test_too_few_pictures(config: Config, tmp_path: Path) -> None:
    train = write_pictures(tmp_path / "few", 1)
    data = replace(config.data, train=str(train))
    with pytest.raises(RadioError, match="has 1 pictures, but a step needs one for each") as error:
        rehearse(replace(config, out=str(tmp_path / "out"), data=data))
    assert "low, high" in str(error.value)


def test_a_covariance_gets_a_vector_for_each_channel(config: Config, tmp_path: Path) -> None:
    small = lowered(config, tmp_path)
    for channels, steps in ((8, 1), (9, 2), (16, 2), (17, 3), (1000, 3)):
        card = replace(small.teachers["parts"].card, feature_dim=channels)
        teachers = small.teachers | {"parts": replace(small.teachers["parts"], card=card)}
        lone = alone(replace(small, teachers=teachers), "parts")
        assert lone.fit.steps == steps  # of 2 views at 2 x 2 positions
        assert list(lone.stages[0].partitions) == ["low"] and list(lone.teachers) == ["parts"]


def test_a_rehearsal_needs_no_data() -> None:
    config = rehearsal_config(["experiment=radio_v2_5_l", "rehearsal=true"])
    assert config.rehearsal and config.data.train == ""
    config = rehearsal_config(["experiment=demo", "rehearsal=true", "data.train=here"])
    assert config.data.train == "here"
    with pytest.raises(RadioError, match=r"data\.train has no value"):
        rehearsal_config(["experiment=radio_v2_5_l", "rehearsal=false"])


def test_the_photographs_are_those_of_the_demo(config: Config, tmp_path: Path) -> None:
    pytest.importorskip("skimage")
    small = lowered(replace(config, data=replace(config.data, train="")), tmp_path)
    assert len(list(Path(small.data.train).iterdir())) == 14
