"""Every experiment that ships: what its header says, and the figures that its paper states."""

from __future__ import annotations

import functools
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from picture_zoo import colours
from tiny import tiny_config, write_pictures

from radio.config import Config, choices, config_dir, load, load_teacher
from radio.data.configured import stage_plans
from radio.encoder.fuse import fuse
from radio.training.cost import stage_cost
from radio.training.distill import distill

NAMES = choices("experiment")
COST = re.compile(r"About ([\d.,]+) (A100-hours|TFLOP) by --dry-run")


@functools.cache
def resolved(name: str) -> Config:
    """Return an experiment's configuration, which nobody here changes."""
    return load([f"experiment={name}", "data.train=photos"])


def header(name: str) -> list[str]:
    """Return the comment that a file opens with, line by line and without its marks."""
    lines = (config_dir() / "experiment" / f"{name}.yaml").read_text().splitlines()
    first = next(number for number, line in enumerate(lines) if not line.startswith("#"))
    return [line.removeprefix("#") for line in lines[1:first]]


def cost_of(config: Config, unit: str) -> float:
    costs = [stage_cost(config, stage) for stage in config.stages]
    if unit == "TFLOP":
        return sum(cost.tflop * cost.steps for cost in costs)
    return sum(cost.gpu_hours for cost in costs)


@pytest.mark.parametrize("name", NAMES)
def test_the_plan_can_be_made(name: str) -> None:
    config = resolved(name)
    assert [plan.steps for plan in stage_plans(config)] == [stage.steps for stage in config.stages]
    assert config.out == f"runs/{name}", "another experiment would go on with this one's run"


@pytest.mark.parametrize("name", NAMES)
def test_the_header_names_its_paper_and_a_cost_that_is_the_dry_runs(name: str) -> None:
    text = " ".join(header(name))
    assert re.search(r"\d{4}\.\d{5}", text) or "no paper" in text
    stated = COST.search(text)
    assert stated, "no 'About ... A100-hours by --dry-run'"
    figure = float(stated[1].replace(",", ""))
    assert figure == pytest.approx(cost_of(resolved(name), stated[2]), rel=0.05)


@pytest.mark.parametrize("name", NAMES)
def test_the_headers_commands_are_accepted(name: str) -> None:
    lines = [line.strip() for line in header(name)]
    commands = [line.split("  (")[0].strip() for line in lines if line.startswith("radio ")]
    assert any(f"experiment={name}" in each.split() or each == f"radio {name}" for each in commands)
    for command in commands:
        verb, *overrides = shlex.split(command)[1:]
        if verb == "train":
            load(overrides)


@pytest.mark.parametrize("name", [name for name in NAMES if "torchrun" in " ".join(header(name))])
def test_the_headers_torchrun_is_accepted(name: str) -> None:
    line = next(line for line in header(name) if line.strip().startswith("torchrun"))
    options = [word for word in line.split() if re.match(r"parallel\.\w+=", word)]
    assert load([f"experiment={name}", "data.train=photos", *options]).parallel.kind == "ddp"


@dataclass(frozen=True)
class Facts:
    """What a paper states: teachers by the tags of configs/teacher, a stage by its batches.

    A stage is its steps and, by partition, views a step and the resolutions they are drawn from.
    """

    student: str
    teachers: dict[str, str]
    losses: tuple[str, str]
    optimizer: tuple[str, float, float]
    stages: list[tuple[int, dict[str, tuple[int, list[int]]]]]


RADIO_V2_5 = {
    "clip": "dfn_clip_h14_378",
    "siglip": "siglip_so400m_14_384",
    "dinov2": "dinov2_g14_reg",
    "sam": "sam_h",
}
C_RADIO_V4 = {"siglip2": "siglip2_gopt_16_384", "dinov3": "dinov3_7b", "sam3": "sam3"}
LAMB = ("lamb", 1e-3, 0.02)
LOW = {"low": (1024, [256])}, {"low": (1024, [432])}
V4_LOW = {"low": (1024, [128, 192, 224, 256, 384, 432])}
V4_HIGH = [512, 768, 1024, 1152]


def of_v2_5(student: str, teachers: dict[str, str]) -> Facts:
    stages = [(300_000, part) for part in (*LOW, LOW[1] | {"high": (128, [1024])})]
    return Facts(student, teachers, ("cosine", "mse"), LAMB, stages)


def of_v4(student: str) -> Facts:
    both = V4_LOW | {"high": (64, V4_HIGH), "windowed": (64, V4_HIGH)}
    stages = [(300_000, V4_LOW), (300_000, both)]
    return Facts(student, C_RADIO_V4, ("angle", "mse"), LAMB, stages)


def alone(size: int) -> dict[str, tuple[int, list[int]]]:
    """Return PHI-S's partitions, one for each teacher."""
    return {name: (256, [size]) for name in RADIO_V2_5}


FACTS = {
    "am_radio_h": Facts(
        "huge",
        {
            "clip": "dfn_clip_h14_378",
            "openai_clip": "openai_clip_l14_336",
            "dinov2": "dinov2_g14_reg",
            "sam": "sam_h",
        },
        ("cosine", "hybrid"),
        ("adamw", 1e-3, 0.02),
        [(300_000, LOW[0]), (300_000, LOW[1] | {"high": (64, [1024])})],
    ),
    "phi_s_b": Facts(
        "base",
        RADIO_V2_5,
        ("cosine", "mse"),
        LAMB,
        [
            (300_000, alone(256)),
            (300_000, alone(432)),
            (300_000, alone(432) | {"high": (128, [1024])}),
        ],
    ),
    "radio_v2_5_b": of_v2_5("base", RADIO_V2_5),
    "radio_v2_5_l": of_v2_5("large", RADIO_V2_5),
    "radio_v2_5_h": of_v2_5("huge", RADIO_V2_5),
    "c_radio_v3_b": of_v2_5(
        "base",
        {
            "clip": "dfn_clip_h14_378",
            "siglip2": "siglip2_so400m_16_naflex",
            "dinov2": "dinov2_g14_reg",
            "sam": "sam_h",
        },
    ),
    "c_radio_v4_so400m": of_v4("so400m"),
    "c_radio_v4_h": of_v4("huge"),
    "proxy_h": Facts(
        "huge",
        {"pe_core": "pe_core_g14_448", "dinov3": "dinov3_h16plus"},
        ("cosine", "hybrid"),
        ("adamw", 1e-3, 0.02),
        [(600_000, LOW[0])],
    ),
    "proxy_b": Facts(
        "base",
        {"proxy": "encoder"},
        ("cosine", "hybrid"),
        ("adamw", 2e-5, 1e-4),
        [(390_000, {"low": (8192, [256])}), (100_000, {"any": (4096, [256, 384, 512])})],
    ),
}


def test_every_experiment_of_a_paper_has_its_facts_here() -> None:
    assert set(FACTS) == set(NAMES) - {"demo", "adapt", "pocket", "pocket_quick", "finding"}


@pytest.mark.parametrize("name", FACTS)
def test_the_papers_figures_are_what_runs(name: str) -> None:
    config, facts = resolved(name), FACTS[name]
    assert config.student.size == facts.student
    assert set(config.teachers) == set(facts.teachers)
    for teacher, tag in facts.teachers.items():
        found = config.teachers[teacher]
        if tag == "encoder":
            assert found.kind == tag
            continue
        shipped = load_teacher(tag)
        assert (found.kind, found.options) == (shipped.kind, shipped.options)
        assert found.pretrained == shipped.pretrained is not None
    assert (config.losses.summary, config.losses.feature) == facts.losses
    chosen = config.optimizer
    assert (chosen.name, chosen.lr, chosen.weight_decay) == facts.optimizer
    assert facts.stages == [
        (
            stage.steps,
            {
                name: (each.batch, each.image_sizes or [each.image_size])
                for name, each in stage.partitions.items()
            },
        )
        for stage in config.stages
    ]


@pytest.mark.parametrize("name", ["radio_v2_5_b", "radio_v2_5_l", "radio_v2_5_h", "c_radio_v3_b"])
def test_v2_5_shows_every_teacher_every_resolution(name: str) -> None:
    """Findings 2 and 3: no mode switch, and mosaics for SAM wherever views are small."""
    config = resolved(name)
    for stage in config.stages:
        for partition in stage.partitions.values():
            assert set(partition.views) == set(config.teachers)
            assert partition.views["sam"] == (
                "native" if partition.image_size == 1024 else "mosaic"
            )


def test_am_radio_shows_sam_one_resolution_and_the_others_another() -> None:
    """What made v1 and v2 switch modes: the high partition is SAM's alone."""
    config = resolved("am_radio_h")
    assert config.losses.grid == "larger"
    assert {teacher.standardizer for teacher in config.teachers.values()} == {"identity"}
    assert list(config.stages[1].partitions["high"].views) == ["sam"]


@pytest.mark.parametrize("name", ["c_radio_v4_so400m", "c_radio_v4_h"])
def test_v4_has_all_that_is_new_in_its_report(name: str) -> None:
    """Sections 2.2 to 2.5, and windows."""
    config = resolved(name)
    assert config.data.shift_margin > 0 and config.losses.mesa_weight > 0
    assert config.student.damp > 0 and config.student.spectral
    last = config.stages[-1].partitions
    assert {name: each.views["siglip2"] for name, each in last.items()} == {
        "low": "native",
        "high": "sharpened",
        "windowed": "sharpened",
    }
    assert [each.window for each in last.values()] == [None, None, 8]


def test_the_proxy_that_is_learnt_is_the_one_that_teaches() -> None:
    proxy = resolved("proxy_b").teachers["proxy"]
    learnt = resolved("proxy_h")
    assert proxy.pretrained == proxy.options["folder"] == f"{learnt.out}/encoder"
    assert proxy.card.summary_dim == proxy.card.feature_dim * len(learnt.teachers)
    assert proxy.card.stride == learnt.student.patch_size


def test_the_anchor_is_what_the_student_starts_from() -> None:
    config = load(["experiment=adapt", "data.train=photos", "student.init=there"])
    anchor = config.teachers["anchor"]
    assert config.student.init == anchor.pretrained == anchor.options["folder"] == "there"
    others = set(config.teachers) - {"anchor"}
    for partition in config.stages[0].partitions.values():
        assert "anchor" in partition.views and others & set(partition.views)


@pytest.mark.slow
def test_adapt_runs_on_a_few_pictures_and_starts_as_the_encoder(tmp_path: Path) -> None:
    """At a learning rate of 0 the new encoder is the old one."""
    first = tiny_config(tmp_path / "first", steps=2)
    first.student.size = "tiny"
    old = fuse(distill(first).out, tmp_path / "old")
    config = load(
        [
            "experiment=adapt",
            f"data.train={write_pictures(tmp_path / 'own', 24)}",
            f"data.val={write_pictures(tmp_path / 'val', 4, seed=1)}",
            f"out={tmp_path / 'adapted'}",
            "student=tiny",
            "student.precision=float32",
            f"student.image_size={first.student.image_size}",
            f"student.init={old}",
            "teachers.anchor.card.summary_dim=384",
            "teachers.anchor.card.feature_dim=192",
            "teacher@teachers.expert=demo_clip",
            "fit.steps=2",
            "optimizer.lr=0",
            "evaluation={views: 4, every_steps: 0}",
            "stages.0.steps=3",
            "stages.0.frozen_trunk_steps=1",
            "stages.0.partitions.low={image_size: 32, batch: 4}",
            "stages.0.partitions.high={image_size: 64, batch: 2}",
        ]
    )
    result = distill(config)
    new = fuse(result.out, tmp_path / "new")
    assert {row.teacher for row in result.after} == {"anchor", "expert"}
    picture = torch.from_numpy(np.array(colours(64, 64, 0)))
    pixels = picture.permute(2, 0, 1)[None].float() / 255
    outputs = [
        transformers.AutoModel.from_pretrained(folder)(pixel_values=pixels).features
        for folder in (old, new)
    ]
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-4, atol=1e-4)
