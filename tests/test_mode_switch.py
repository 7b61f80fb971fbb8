"""Task mode-switch: the curve of explained variance, judged by training's own Fidelity."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_encoder import head, small_weights
from test_zero_shot import CLIP, SEED, write_data

from radio.config import TeacherConfig, load_teacher
from radio.encoder.images import resized
from radio.encoder.weights import TeacherHeads
from radio.errors import RadioError
from radio.evaluation.mode_switch import mode_switch, worst_ratio
from radio.evaluation.pictures import Pictures
from radio.evaluation.result import Options
from radio.evaluation.target import Target
from radio.evaluation.target_kinds import EncoderTarget, PixelsTarget, TeacherTarget
from radio.targets.grid import coarser, to_grid
from radio.targets.standardize import PhiS
from radio.training.metrics import Fidelity

FAKE: dict[str, Any] = {
    "kind": "fake",
    "options": {
        "summary_dim": None,
        "feature_dim": 7,
        "stride": 14,
        "native_size": 56,
        "view_modes": ["match"],
    },
    "pretrained": None,
    "seed": 3,
}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, _two_threads: None) -> None:
    monkeypatch.setenv("RADIO_CACHE", str(tmp_path / "cache"))
    torch.set_num_threads(1)


@pytest.fixture
def data(tmp_path: Path) -> Pictures:
    return write_data(tmp_path / "data", [{} for _ in range(5)])


def parts() -> TeacherTarget:
    return TeacherTarget("parts", TeacherConfig("fake", FAKE["options"]), FAKE["seed"])


class Student(Target):
    """Says what the teacher `parts` says, after `change(maps, size)`; patches of 16 px."""

    def __init__(self, data: Pictures, change: Callable[[torch.Tensor, int], torch.Tensor]) -> None:
        self.data, self.change, self.teacher = data, change, parts()
        super().__init__(
            "student",
            "student",
            ("parts:features",),
            native_size=96,
            patch=16,
            facts={"parts": FAKE},
        )

    def extract(self, images: torch.Tensor, names: Sequence[str]) -> dict[str, torch.Tensor]:
        size = images.shape[-1]
        matched = pictures(self.data, size // 16 * 14)[: len(images)]
        maps = self.teacher.extract(matched, ("features",))["features"]
        return {"parts:features": self.change(maps, size)}


def pictures(data: Pictures, size: int) -> torch.Tensor:
    split = data.split("val")
    return torch.stack([resized(split.picture(index), 1, size) for index in range(len(split))])


def test_what_is_the_teacher_s_own_is_explained_at_every_size(data: Pictures) -> None:
    result = mode_switch(Student(data, lambda maps, size: maps), data, Options())
    assert result.details["curve"]["x"] == [48, 64, 80, 96]
    assert result.details["curve"]["y"]["parts"] == pytest.approx([1.0] * 4)
    assert result.score == pytest.approx(1) and "warning" not in result.details["teachers"]["parts"]


def test_a_hole_between_the_sizes_is_seen(data: Pictures) -> None:
    def hole(maps: torch.Tensor, size: int) -> torch.Tensor:
        mean = maps.mean((0, 2, 3), keepdim=True)
        return mean + (maps - mean) * (0.5 if size == 80 else 0.9)

    result = mode_switch(Student(data, hole), data, Options(sizes=(96, 64)))
    e = {0.5: 1 - 0.25, 0.9: 1 - 0.01}  # 1 - (1 - s)^2
    assert result.details["curve"]["y"]["parts"] == pytest.approx([e[0.9], e[0.5], e[0.9]])
    assert result.score == pytest.approx(e[0.5] / e[0.9])
    assert result.interval is not None
    assert result.interval[0] - 1e-9 <= result.score <= result.interval[1] + 1e-9
    json.dumps(result.as_dict())


def test_nothing_explained_is_no_score_and_is_said(data: Pictures) -> None:
    result = mode_switch(Student(data, lambda maps, size: 0 * maps + 9), data, Options())
    teacher = result.details["teachers"]["parts"]
    assert teacher["max"] < 0 and result.score == 0
    assert "of the variance is explained, less than 0.1" in teacher["warning"]


def encoder(**facts: Any) -> EncoderTarget:
    """Return three blocks with a head to a fake teacher of any size and one to a fixed CLIP."""
    teachers = {
        "parts": TeacherHeads(0, {"features": head(96, 7)}, facts={**FAKE, **facts}),
        "clip": TeacherHeads(1, {"features": head(96, 192)}, facts=CLIP),
        "odd": TeacherHeads(2, {"summary": head(96, 5)}, facts={"kind": "dinov2"}),
    }
    return EncoderTarget("student", replace(small_weights(), teachers=teachers))


def judged(student: Target, teacher: Target, name: str, size: int, data: Pictures) -> float:
    """Return e by training's Fidelity, all pictures at once."""
    p = student.extract(pictures(data, size), (f"{name}:features",))[f"{name}:features"]
    shown = size // 16 * teacher.patch if teacher.takes_any_size else teacher.native_size
    y = teacher.extract(pictures(data, shown), ("features",))["features"]
    grid = coarser((p.shape[2], p.shape[3]), (y.shape[2], y.shape[3]))
    p, y = to_grid(p, grid), to_grid(y, grid)
    fidelity = Fidelity()
    fidelity.update(p, y, torch.ones(len(y), *grid, dtype=torch.bool))
    return 1 - 1 / fidelity.value


def test_an_encoder_is_held_against_teachers_of_any_and_of_one_size(
    data: Pictures, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("radio.evaluation.mode_switch.BATCH", 2)
    student = encoder()
    clip = TeacherTarget("clip", load_teacher("demo_clip"), SEED)
    done: list[tuple[int, int]] = []
    result = mode_switch(student, data, Options(sizes=(96, 160)), lambda d, t: done.append((d, t)))
    sizes = list(range(96, 161, 16))  # the CLIP's grid of 8 is the coarser one from 144 px
    curves = result.details["curve"]
    assert curves["x"] == sizes and list(curves["y"]) == ["parts", "clip"]
    for name, teacher in (("parts", parts()), ("clip", clip)):
        expected = [judged(student, teacher, name, size, data) for size in sizes]
        assert curves["y"][name] == pytest.approx(expected, rel=1e-4)
    assert result.details["teachers"]["clip"]["shown"] == "native"
    assert result.details["teachers"]["parts"]["shown"] == "match"
    fractions = [at / total for at, total in done]
    assert fractions == sorted(fractions) and fractions[-1] == 1
    alone = mode_switch(student, data, Options(sizes=(48, 64), adaptor="parts"))
    assert list(alone.details["teachers"]) == ["parts"]


def test_a_teacher_of_mosaics_is_held_against_what_it_says_on_a_canvas(data: Pictures) -> None:
    """Of 128 px four share a canvas, of 144 px one is whole, 256 px are it; all are full."""
    config = load_teacher("demo_sam")
    sam = TeacherTarget("sam", config, 3)
    facts = {"kind": "sam", "options": dict(config.options), "pretrained": None, "seed": 3}
    heads = {"sam": TeacherHeads(0, {"features": head(96, 192)}, facts=facts)}
    student = EncoderTarget("student", replace(small_weights(), teachers=heads))
    found = mode_switch(student, data, Options(sizes=(128, 256))).details
    assert found["teachers"]["sam"]["shown"] == "mosaic"
    for size, per_side in ((128, 2), (144, 1), (256, 1)):
        views, side, rows = sam.normalised(pictures(data, size)), 256 // per_side, size // 16
        canvases, corners = [], []
        along, at = math.ceil(256 / size), torch.arange(256)
        for canvas in range(math.ceil(5 / per_side**2)):
            order = (at // size)[:, None] * along + at // size + canvas * per_side**2
            where = order % 5, slice(None), (at % size)[:, None], at % size
            canvases.append(views[where].movedim(2, 0))
        for index in range(5):
            canvas, place = divmod(index, per_side**2)
            top, left = side * (place // per_side), side * (place % per_side)
            corners.append((canvas, top // 16, left // 16))
        whole = sam.teacher(torch.stack(canvases)).features
        y = torch.stack([whole[c, :, i : i + rows, j : j + rows] for c, i, j in corners])
        p = student.extract(pictures(data, size), ("sam:features",))["sam:features"]
        fidelity = Fidelity()
        fidelity.update(p, y, torch.ones(5, rows, rows, dtype=torch.bool))
        at = found["curve"]["x"].index(size)
        e = found["curve"]["y"]["sam"][at]
        assert e == pytest.approx(1 - 1 / fidelity.value, rel=1e-4), size


def test_the_space_of_phi_s_gives_the_same() -> None:
    generator = torch.Generator().manual_seed(0)
    y = torch.randn(6, 12, 4, 4, generator=generator) * torch.arange(1, 13).view(1, 12, 1, 1)
    p = y + torch.randn(y.shape, generator=generator)
    own, inside = Fidelity(), Fidelity()
    own.update(p, y)
    phi_s = PhiS(12).partial_fit(y.movedim(1, -1).reshape(-1, 12)).fit()
    inside.update(phi_s.transform_map(p), phi_s.transform_map(y))
    values = [part.by_view().sum(0) for part in (own, inside)]
    shares = [float(residual / spread) for spread, residual in values]
    assert shares[0] == pytest.approx(shares[1], rel=1e-5)


def test_the_score_is_the_worst_teacher_s() -> None:
    values = np.ones((3, 2, 2, 2))
    values[:, 0, 0, 1], values[:, 0, 1, 1] = 0.2, 0.6  # e 0.8 and 0.4
    values[:, 1, :, 1] = 0.5
    assert worst_ratio(values) == pytest.approx(0.5)


def test_what_cannot_be_compared_is_refused(data: Pictures) -> None:
    with pytest.raises(RadioError, match="'pixels' predicts no teacher's features"):
        mode_switch(PixelsTarget(), data, Options())
    student = encoder()
    with pytest.raises(RadioError, match="no adaptor 'odd' for features; it has: parts, clip"):
        mode_switch(student, data, Options(adaptor="odd"))
    with pytest.raises(RadioError, match="a curve needs a smaller and a larger one"):
        mode_switch(student, data, Options(sizes=(64,)))
    with pytest.raises(RadioError, match="50 px is no multiple of the 16 px"):
        mode_switch(student, data, Options(sizes=(50, 96)))
    with pytest.raises(RadioError, match="'parts' has other weights than when 'student' was"):
        mode_switch(encoder(fingerprint="0" * 64), data, Options())
    assert mode_switch(encoder(fingerprint=parts().fingerprint), data, Options(sizes=(48, 64)))
    older = encoder()
    older.facts["parts"] = {"kind": "fake"}
    with pytest.raises(RadioError, match=r"how to build the teacher 'parts'.*no options, pretr"):
        mode_switch(older, data, Options())
