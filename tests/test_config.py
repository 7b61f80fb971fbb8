from __future__ import annotations

from pathlib import Path

import pytest
from tiny import tiny_config

from radio.config import choices, config_dir, from_yaml, load, load_teacher, to_yaml
from radio.data.configured import training_plan
from radio.errors import RadioError

LOW = "stages.0.partitions.low"
VIEWS = f"{LOW}.views"


@pytest.mark.parametrize("name", choices("experiment"))
def test_every_experiment_composes_and_reads_back(name: str) -> None:
    config = load([f"experiment={name}", "data.train=photos"])
    assert from_yaml(to_yaml(config)) == config
    header = (config_dir() / "experiment" / f"{name}.yaml").read_text()
    assert f"experiment={name}" in header, "an experiment opens with its command"
    training_plan(config, 10**6)  # every view fits its canvas


@pytest.mark.parametrize("group", ["student", "data", "cluster"])
def test_every_choice_of_every_group_composes(group: str) -> None:
    for name in choices(group):
        load(["experiment=demo", f"{group}={name}"])


def test_every_teacher_can_join_a_run() -> None:
    """All at once: composing a run takes longer than a teacher's part in it."""
    names = choices("teacher")
    joined = [f"+teacher@teachers.{name}={name}" for name in names]
    views = [f"+{VIEWS}.{name}=native" for name in names]
    config = load(["experiment=demo", *joined, *views])
    assert len(config.teachers) == 4 + len(names)
    for name in names:
        assert config.teachers[name] == load_teacher(name), name


def test_the_demo_has_the_documented_keys() -> None:
    config = load(["experiment=demo"])
    assert list(config.teachers) == ["clip", "siglip", "dinov2", "sam"]
    assert config.stream == "ray"
    assert list(config.stages[0].partitions) == ["low", "high"]
    assert config.stages[0].partitions["low"].views["sam"] == "mosaic"


def test_an_override_reaches_its_leaf_and_nothing_else() -> None:
    base, changed = load(["experiment=demo"]), load(["experiment=demo", "optimizer.lr=0.5"])
    assert changed.optimizer.lr == 0.5
    changed.optimizer.lr = base.optimizer.lr
    assert changed == base


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["experiment=dmeo"], ["dmeo", "demo"]),
        (["experiment=demo", "optimizer.lrr=1"], ["lrr"]),
        (["experiment=demo", "optimizer.lr=fast"], ["lr", "fast"]),
        (["experiment=demo", "data.train=a-{0..9}.tar"], ["quotes"]),
        (["experiment=demo", "stream=rai"], ["stream", "rai", "local, ray"]),
        (["experiment=demo", "stream=local", "cluster=auto"], ["cluster.address", "stream=ray"]),
        (["experiment=demo", "teacher@teachers.clip=clipp"], ["clipp"]),
        (["experiment=demo", "stages.0.partitions.low.image_size=100"], ["100", "96", "112"]),
        (["experiment=demo", "stages.0.partitions.low.views.sam=tile"], ["tile", "mosaic"]),
        (["experiment=demo", "teachers.sam.summary_weight=1"], ["sam.summary_weight", "must be 0"]),
        (["experiment=demo", "stages.0.partitions.low.views.clip=mosaic"], ["clip", "native"]),
        (
            ["experiment=demo", "+teacher@teachers.more=fake"],
            ["no stage", "more", "~teachers.more"],
        ),
        (["experiment=demo", "stages.0.refit=true"], ["stages[0].refit", "always fits"]),
        (["experiment=demo", "stages.0.frozen_trunk_steps=111"], ["frozen_trunk_steps", "110"]),
        (["experiment=demo", f"{LOW}.image_sizes=[96,128,200]"], ["200", "192 and 208"]),
        (["experiment=demo", f"{LOW}.image_sizes=[96]"], ["image_size is 128", "[96]"]),
        (["experiment=demo", "data.train=[a"], ["'[a'", "needs quotes"]),
        ([], ["out has no value", "experiment=NAME", "demo"]),
    ],
)
def test_bad_overrides_name_the_key_and_the_way_out(overrides: list[str], words: list[str]) -> None:
    with pytest.raises(RadioError) as caught:
        load(overrides)
    for word in words:
        assert word in str(caught.value), f"{word!r} not in {caught.value}"


def test_a_quoted_brace_pattern_arrives_whole() -> None:
    config = load(["experiment=demo", "data.train='a-{0..9}.tar'"])
    assert config.data.train == "a-{0..9}.tar"


def test_a_config_of_python_objects_survives_yaml(tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    assert from_yaml(to_yaml(config)) == config
