"""Crops that differ by whole patches, views that are not square, and what is learnt from them."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_distill import DyingStream, Killed, losses_of, rows_of
from test_recipe_options import with_options
from test_stages import two_stages
from tiny import tiny_config

from radio.checks import check
from radio.config import Config
from radio.data.configured import training_plan
from radio.data.plan import PartitionSpec, ViewSpec, shape_of
from radio.data.views import Crop, Framing, ViewReader, part_of, random_crop
from radio.encoder.fuse import weights_of
from radio.errors import RadioError
from radio.targets.angles import angle_dispersion
from radio.targets.fit import fit, read_dispersions
from radio.targets.stream import LocalStream
from radio.targets.target_maker import Request
from radio.training.checkpoint import find_checkpoint
from radio.training.distill import distill
from radio.training.equivariance import shift_features

pytestmark = pytest.mark.usefixtures("no_report")
PATCH, GRID, MARGIN = 8, 4, 2


class Noise:
    """Pictures of noise whose side is exactly a crop of GRID + MARGIN patches."""

    fingerprint = "0" * 64

    def __len__(self) -> int:
        return 12

    def key(self, index: int) -> str:
        return f"k{index}"

    def read(self, index: int) -> bytes:
        side = (GRID + MARGIN) * PATCH
        pixels = np.random.default_rng(index).integers(0, 256, (side, side, 3), dtype=np.uint8)
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "PNG")
        return file.getvalue()


def cut(reader: str, views: list[ViewSpec]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a reader's views of whole pictures, pixel by pixel, and its offsets."""
    source = ViewReader(Noise(), 3, (1.0, 1.0))
    framing = Framing(reader, 1.0, (GRID, GRID), MARGIN)
    read = source.batch(views, GRID * PATCH, framing)
    return read.pixels.float(), torch.tensor(read.offsets)


def test_readers_see_parts_of_one_crop_whole_patches_apart() -> None:
    """What the student sees at u + shift, mirrored or not, the teacher sees at u."""
    views = [ViewSpec(sample, 0, 100 + sample) for sample in range(12)]
    student, ours = cut("student", views)
    teacher, theirs = cut("clip", views)
    shift = theirs - ours
    assert len({tuple(row) for row in shift.tolist()}) > 4, "readers move on their own"
    moved, inside = shift_features(student, shift * PATCH)
    assert torch.equal(
        moved[inside[:, None].expand_as(moved)], teacher[inside[:, None].expand_as(moved)]
    )
    common = (GRID - shift.abs()).prod(1) * PATCH**2
    assert torch.equal(inside.sum((1, 2)), common)
    flips = {random_crop(48, 48, seed, (1.0, 1.0)).flip for seed in range(8)}
    assert flips == {True, False}


def test_offsets_are_uniform_and_a_box_stays_in_its_crop() -> None:
    reader = ViewReader(Noise(), 0, (0.4, 1.0))
    framing = Framing("sam", 1.0, (7, 5), 2)
    drawn = torch.tensor([reader.offset(ViewSpec(0, 0, at), framing) for at in range(4500)])
    counts = torch.bincount(drawn[:, 0] * 3 + drawn[:, 1], minlength=9)
    assert (counts - 500).abs().max() < 110  # five deviations
    for flip in (False, True):
        crop = Crop((1 / 3, 0.1, 77.7, 55.1), flip)
        parts = [part_of(crop, (y, x), framing).box for y in range(3) for x in range(3)]
        assert min(box[0] for box in parts) == crop.box[0]
        assert min(box[1] for box in parts) == crop.box[1]
        for side in (2, 3):  # Pillow refuses a box that is larger by one rounding
            most = max(box[side] for box in parts)
            assert most <= crop.box[side] and most == pytest.approx(crop.box[side])
        for left, top, right, bottom in parts:
            assert right - left == pytest.approx((77.7 - 1 / 3) * 5 / 7)
            assert bottom - top == pytest.approx(55.0 * 7 / 9)


def shifted(config: Config) -> Config:
    return with_options(
        config, data__shift_margin=1, losses__mesa_weight=0.5, optimizer__ema_decay=0.9
    )


def test_a_student_that_says_what_the_teacher_sees_of_the_picture_has_no_loss(
    tmp_path: Path,
) -> None:
    """The teacher itself on the student's crops is that student, once brought to its crops."""
    config = with_options(tiny_config(tmp_path), data__shift_margin=1)
    with LocalStream(config) as stream:
        spec = training_plan(config, 24)(0)
        batch = next(iter(stream.read([spec], Request("train", "float32", {}))))
        low, maker = batch.partitions[0], stream.makers["edges"]
        target = low.targets["edges"]
        assert target.shift is not None
        with torch.inference_mode():
            pixels = maker._normalise(low.images)
            said = maker.teacher.mix(maker.teacher.patch(pixels).tanh())
    seen = target.features - target.features.mean((2, 3), keepdim=True)
    assert target.shift.any() and seen.abs().max() > 0
    moved, inside = shift_features(said, target.shift)
    # The fake teacher adds one vector per view to every position, which a difference takes away.
    error = torch.where(inside[:, None], moved - target.features, torch.nan)
    spread = (error - error.nanmean((2, 3), keepdim=True)).nan_to_num().abs().amax((1, 2, 3))
    still = (low.images.shape[0], 2)
    unmoved, everywhere = shift_features(said, torch.zeros(still, dtype=torch.int64))
    wrong = unmoved - target.features
    wrong = (wrong - wrong.mean((2, 3), keepdim=True)).abs().amax((1, 2, 3))
    moving = target.shift.any(1)
    assert everywhere.all() and (spread < 0.1 * wrong)[moving].all()


def test_shifted_crops_train_resume_and_leave_the_held_out_set_alone(tmp_path: Path) -> None:
    plain = distill(tiny_config(tmp_path / "plain", steps=3)).out
    whole = distill(shifted(tiny_config(tmp_path / "whole", steps=3))).out
    losses = losses_of(whole)
    assert all(step["average/mesa"] > 0 for step in losses)
    assert losses[0]["parts/features"] != losses_of(plain)[0]["parts/features"]
    config = shifted(tiny_config(tmp_path, steps=3))
    config.checkpoint.every_steps = 1
    with pytest.raises(Killed), DyingStream(config, at=2) as stream:
        distill(config, stream)
    distill(config)
    assert losses_of(config.out) == losses and rows_of(config.out) == rows_of(whole)
    spec = training_plan(config, 24).held_out(4, 4, config.teachers)[0]
    assert (spec.margin, spec.shape) == (0, None)


def test_mesa_is_weighed_by_its_key_and_by_no_balance(tmp_path: Path) -> None:
    runs = []
    for name, weight in (("some", 0.5), ("more", 5.0)):
        config = shifted(tiny_config(tmp_path / name, steps=2))
        config.losses.mesa_weight, config.losses.balance = weight, "ada_loss"
        runs.append(losses_of(distill(config).out))
    assert runs[0][0] == runs[1][0] and runs[0][1] != runs[1][1]


def test_aspects_are_drawn_by_the_step(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, steps=4)
    for partition in config.stages[0].partitions.values():
        partition.views = {"words": "native", "parts": "match"}
        partition.aspects = [0.5, 1.0, 2.0]
    del config.teachers["edges"]
    check(config)
    plan = training_plan(config, 24)
    shapes = {plan(step).partitions[1].pixels for step in range(4)}
    assert len(shapes) > 1 and shapes <= {(96, 48), (64, 64), (48, 96)}
    assert plan(2) == training_plan(config, 24)(2)
    out = distill(config).out
    assert len(losses_of(out)) == 4
    with LocalStream(config) as stream:
        specs = [plan(step) for step in range(4)]
        for batch in stream.read(specs, Request("train", "float32", {})):
            for spec, part in zip(specs[batch.step].partitions, batch.partitions, strict=True):
                grid = tuple(side // 16 for side in spec.pixels)
                assert tuple(part.images.shape[-2:]) == spec.pixels
                assert tuple(part.targets["parts"].features.shape[-2:]) == grid


def test_windows_are_drawn_among_those_that_tile_the_grid(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, steps=3)
    low, high = (config.stages[0].partitions[name] for name in ("low", "high"))
    high.merge_per_block, high.windows = 0, [0, 2, 3, 4]
    check(config)
    plan = training_plan(config, 240)
    assert [plan(step).partitions[0].window for step in range(3)] == [None] * 3
    config.stages[0].steps = 40
    drawn = [training_plan(config, 400)(step).partitions[1].window for step in range(40)]
    assert set(drawn) == {None, 2, 4}, "3 does not tile 4 x 4 tokens"
    config.stages[0].steps = 3
    assert len(losses_of(distill(config).out)) == 3
    high.windows = [3]
    with pytest.raises(RadioError, match=r"'high' has windows \[3\].*4 x 4 tokens of 64 x 64"):
        training_plan(config, 24)
    high.windows, high.merge_per_block = [2], 1
    with pytest.raises(RadioError, match=r"high\.window goes with no token merging"):
        check(config)
    low.windows = [-1]
    with pytest.raises(RadioError, match=r"low\.windows is \[-1\]"):
        check(config)


def test_a_shape_has_whole_patches_about_its_area_and_its_aspect() -> None:
    for aspect in (0.5, 0.75, 1.0, 4 / 3, 2.0):
        height, width = shape_of(432, aspect, 16)
        assert height % 16 == width % 16 == 0
        assert width / height == pytest.approx(aspect, rel=0.05)
        assert height * width == pytest.approx(432**2, rel=0.05)
    assert shape_of(16, 9.0, 16) == (16, 48)
    spec = PartitionSpec("a", 64, (), {}, ())
    assert spec.pixels == (64, 64)


def test_the_spread_of_summaries_is_measured_and_divides_the_angle(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, steps=1)
    config.losses.summary = "angle"
    plan = training_plan(config, 24)
    with LocalStream(config) as stream:
        found = read_dispersions(fit(config, stream))
        specs = [plan(step) for step in range(1)]
        request = Request("train", "float32", {})
        config.fit.steps = 1
        config.out = str(tmp_path / "one")
        one = read_dispersions(fit(config, stream))
        batch = next(iter(stream.read(specs, request)))
    seen = torch.cat([part.targets["words"].summary for part in batch.partitions])  # type: ignore[misc]
    assert set(found) == {"words", "parts"}, "mosaics have no summaries"
    assert one["words"] == pytest.approx(float(angle_dispersion(seen.double())))
    assert one["words"] != found["words"]
    losses = losses_of(distill(config).out)[0]
    config.losses.summary, config.out = "cosine", str(tmp_path / "cosine")
    assert losses["words/summary"] > losses_of(distill(config).out)[0]["words/summary"]


def test_a_finer_adaptor_trains_survives_a_refit_and_is_fused(tmp_path: Path) -> None:
    config = two_stages(tmp_path)
    config.teachers["words"].upsample = 2
    config.stages[1].lr = 1e-12  # nothing is learnt: only the space changes
    config.checkpoint.every_steps, config.checkpoint.keep = 1, 9
    check(config)
    out = distill(config).out
    heads = [
        weights_of(find_checkpoint(out / "checkpoints" / f"step-{step:06d}")).teachers["words"]
        for step in (3, 4)
    ]
    assert [head.upsample for head in heads] == [2, 2]
    before, after = (head.states["features"]["final.2.weight"].double() for head in heads)
    assert (after - before).norm() < 1e-5 * before.norm()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data__shift_margin": -1}, "data.shift_margin is -1"),
        ({"losses__mesa_weight": 1.0}, "losses.mesa_weight is 1.0.*data.shift_margin=0"),
        (
            {"losses__mesa_weight": 1.0, "data__shift_margin": 1},
            "losses.mesa_weight is 1.0.*optimizer.ema_decay",
        ),
    ],
)
def test_contradictions_name_both_keys(
    change: dict[str, object], message: str, tmp_path: Path
) -> None:
    with pytest.raises(RadioError, match=message):
        with_options(tiny_config(tmp_path), **change)


def test_aspects_are_refused_where_squares_are_needed(tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    config.stages[0].partitions["low"].aspects = [0.5]
    with pytest.raises(RadioError, match=r"low\.aspects.*low\.views\.edges is 'mosaic'"):
        check(config)
    config = tiny_config(tmp_path)
    high = config.stages[0].partitions["high"]
    high.aspects, high.window, high.merge_per_block = [0.5], 2, 0
    with pytest.raises(RadioError, match=r"high\.aspects.*high\.window=2"):
        check(config)
    config = tiny_config(tmp_path)
    config.teachers["words"].upsample = 3
    with pytest.raises(RadioError, match=r"words\.upsample is 3; it must divide"):
        check(config)
    config.teachers["words"].upsample, config.teachers["words"].upsampler = 1, "x.pt2"
    with pytest.raises(RadioError, match="'sharpened' only"):
        check(config)
