"""Every YAML key as a typed field; the only place that knows Hydra.

Values live in `configs/*.yaml`, defaults in these dataclasses only. `load` composes, checks and
returns plain dataclasses; no DictConfig goes further than this file.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from radio.errors import RadioError

STREAMS = ("local", "ray")
PRECISIONS = ("float32", "bf16")
VIEW_MODES = ("native", "match", "mosaic", "padded", "tiled", "sharpened")
NEEDS = {"tiled": "native", "sharpened": "native", "padded": "mosaic"}  # of a teacher's own modes
GRIDS = ("coarser", "larger")


@dataclasses.dataclass
class ThreadsConfig:
    """Real CPU threads of each process; part of what decides a training step's low bits."""

    student: int = 2
    teacher: int = 1


@dataclasses.dataclass
class ClusterConfig:
    """Which Ray cluster: null is RAY_ADDRESS or else local, a new one of `cpus` logical CPUs."""

    address: str | None = None
    cpus: int = 8
    object_store_mb: int = 1024
    replicas: int = 1
    call_timeout_seconds: float = 300.0
    give_up_seconds: float = 900.0


@dataclasses.dataclass
class DataConfig:
    """Pictures: folders, tars, brace patterns or URLs; `val` is never trained on."""

    train: str = MISSING
    val: str | None = None
    repeat_epochs: int = 0
    max_damaged: float = 0.01
    crop_scale: list[float] = dataclasses.field(default_factory=lambda: [0.4, 1.0])
    micro_batch: int = 8


@dataclasses.dataclass
class StudentConfig:
    """The ViT; `image_size` is the side in pixels of its position table's square."""

    size: str = "tiny"
    patch_size: int = 16
    image_size: int = 512
    merge_per_block: int = 0
    layer_scale: float | None = None
    adaptor_hidden: int | None = None
    adaptor_depth: int = 2
    init: str | None = None
    precision: str = "float32"
    adaptor_kind: str = "mlp"  # of the feature adaptors: mlp, attention
    spectral: bool = False  # reparametrise every Linear by its spectral norm
    drop_path: float = 0.0  # rate of the last block, growing linearly
    checkpointing: bool = False  # recompute the blocks in the backward
    num_windowed: int | None = None  # windowed blocks between global ones; else of num_global
    num_global: int = 4  # global blocks, where a partition has a window
    damp: float = 0.0  # deviation of the noise on the backbone's weights in a step (DAMP)


@dataclasses.dataclass
class TeacherCard:
    """What is known of a teacher without building it: channels, pixels, millions, GFLOP."""

    summary_dim: int | None = None
    feature_dim: int = MISSING
    stride: int = MISSING
    native_size: int = MISSING
    view_modes: list[str] = MISSING
    parameters_m: float = MISSING
    gflops: float = MISSING
    weights_licence: str = MISSING
    source: str = MISSING


@dataclasses.dataclass
class TeacherConfig:
    """One frozen teacher; `kind` is a module of teachers/, `pretrained` a tag or a file."""

    kind: str = MISSING
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    pretrained: str | None = None
    summary_weight: float = 1.0
    feature_weight: float = 1.0
    standardizer: str = "phi_s"
    card: TeacherCard = dataclasses.field(default_factory=TeacherCard)


@dataclasses.dataclass
class FitConfig:
    """Steps of the stream whose features the standardizers are fitted on, before step 0."""

    steps: int = 10


@dataclasses.dataclass
class LossConfig:
    """Names of rows in radio.training.losses and radio.training.balance."""

    summary: str = "cosine"
    feature: str = "mse"
    grid: str = "coarser"  # of the student's and the teacher's, or the larger (AM-RADIO)
    balance: str = "fixed"
    balance_options: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class OptimizerConfig:
    """Optimizer and its schedule: linear warm-up, then cosine to zero over each stage."""

    name: str = "adamw"
    lr: float = 1e-3
    weight_decay: float = 0.02
    warmup_steps: int = 0
    clip_norm: float | None = 1.0
    ema_decay: float | None = None  # of the averaged student that is then evaluated and fused


@dataclasses.dataclass
class CheckpointConfig:
    """A checkpoint every so many steps; the newest `keep` stay."""

    every_steps: int = 1000
    keep: int = 2


@dataclasses.dataclass
class EvaluationConfig:
    """Held-out crops per resolution, and after how many steps to look (0: only at the end)."""

    views: int = 64
    every_steps: int = 0


@dataclasses.dataclass
class PartitionConfig:
    """A share of a step: its resolution, its batch, and each teacher's view mode.

    With `image_sizes` every step draws one of them (C-RADIOv4); `image_size` is the one that is
    measured.
    """

    image_size: int = MISSING
    batch: int = MISSING
    views: dict[str, str] = MISSING
    merge_per_block: int | None = None  # null: student.merge_per_block
    image_sizes: list[int] = dataclasses.field(default_factory=list)
    window: int | None = None  # tokens along a window's side; null: attention is global


@dataclasses.dataclass
class StageConfig:
    """A part of the run with its own partitions and a fresh schedule.

    `lr` takes the place of optimizer.lr; the backbone stands still for `frozen_trunk_steps`, while
    the adaptors learn; `refit` fits the standardizers on this stage's own views before it begins.
    """

    steps: int = MISSING
    partitions: dict[str, PartitionConfig] = MISSING
    lr: float | None = None
    frozen_trunk_steps: int = 0
    refit: bool = False


@dataclasses.dataclass
class Config:
    """A run."""

    out: str = MISSING
    seed: int = 0
    stream: str = "local"
    codec: str = "bf16"
    device: str = "auto"
    log_every_steps: int = 1
    threads: ThreadsConfig = dataclasses.field(default_factory=ThreadsConfig)
    cluster: ClusterConfig = dataclasses.field(default_factory=ClusterConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    student: StudentConfig = dataclasses.field(default_factory=StudentConfig)
    teachers: dict[str, TeacherConfig] = dataclasses.field(default_factory=dict)
    fit: FitConfig = dataclasses.field(default_factory=FitConfig)
    losses: LossConfig = dataclasses.field(default_factory=LossConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)
    evaluation: EvaluationConfig = dataclasses.field(default_factory=EvaluationConfig)
    stages: list[StageConfig] = MISSING


def config_dir() -> Path:
    """Return the folder of YAML files: inside the wheel, or the repository's own."""
    shipped = Path(__file__).parent / "configs"
    return shipped if shipped.is_dir() else Path(__file__).parents[1] / "configs"


def choices(group: str) -> list[str]:
    """Return the names that a config group offers, sorted (`teacher`, `experiment`, ...)."""
    return sorted(path.stem for path in (config_dir() / group).glob("*.yaml"))


def load(overrides: Sequence[str] = ()) -> Config:
    """Compose `configs/train.yaml` with Hydra overrides and return a checked Config.

    Raises:
        RadioError: an unknown key, group or value, a missing field, or a contradiction; the
            message names the key and the way out.
    """
    ConfigStore.instance().store(name="schema", node=Config)
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(config_dir().resolve()), version_base="1.3"):
            composed = compose("train", overrides=list(overrides))
        config = OmegaConf.to_object(composed)
    except (HydraException, OmegaConfBaseException) as error:
        raise RadioError(_explain(error)) from error
    assert isinstance(config, Config)
    check(config)
    return config


def from_yaml(text: str) -> Config:
    """Read back what `to_yaml` wrote."""
    try:
        merged = OmegaConf.merge(OmegaConf.structured(Config), OmegaConf.create(text))
        config = OmegaConf.to_object(merged)
    except (OmegaConfBaseException, yaml.YAMLError) as error:
        raise RadioError(f"not a run's config.yaml: {error}") from error
    assert isinstance(config, Config)
    return config


def to_yaml(config: Config) -> str:
    """Return the resolved configuration as YAML, keys in the order of the dataclasses."""
    return yaml.safe_dump(dataclasses.asdict(config), sort_keys=False)


def load_teacher(name: str) -> TeacherConfig:
    """Read `configs/teacher/<name>.yaml` alone."""
    path = config_dir() / "teacher" / f"{name}.yaml"
    if not path.exists():
        known = ", ".join(choices("teacher"))
        raise RadioError(f"unknown teacher '{name}'; known: {known}")
    merged = OmegaConf.merge(OmegaConf.structured(TeacherConfig), OmegaConf.load(path))
    teacher = OmegaConf.to_object(merged)
    assert isinstance(teacher, TeacherConfig)
    return teacher


def check(config: Config) -> None:
    """Refuse what cannot run, naming the keys, before anything is started."""
    _one_of("stream", config.stream, STREAMS)
    _one_of("student.precision", config.student.precision, PRECISIONS)
    _one_of("losses.grid", config.losses.grid, GRIDS)
    if not config.teachers:
        raise RadioError(
            "no teachers: choose an experiment (experiment=demo) or add one, "
            "for example +teacher@teachers.clip=demo_clip"
        )
    if not config.stages:
        raise RadioError("no stages: an experiment needs at least one stage with partitions")
    if config.data.micro_batch < 1:
        raise RadioError(f"data.micro_batch is {config.data.micro_batch}; it must be at least 1")
    for number, stage in enumerate(config.stages):
        for name, partition in stage.partitions.items():
            _check_partition(config, f"stages[{number}].partitions.{name}", partition)
        _check_stage(config, number)
    unused = set(config.teachers) - set().union(*map(teachers_of, config.stages))
    if unused:
        names = ", ".join(sorted(unused))
        raise RadioError(
            f"no stage has views for teacher {names}; give it a view mode in a partition "
            f"(stages.0.partitions.NAME.views), or take it out with ~teachers.{min(unused)}"
        )


def teachers_of(stage: StageConfig) -> set[str]:
    """Return the names of the teachers that a stage's partitions are matched to."""
    return {name for partition in stage.partitions.values() for name in partition.views}


def _check_stage(config: Config, number: int) -> None:
    stage, where = config.stages[number], f"stages[{number}]"
    if not 0 <= stage.frozen_trunk_steps <= stage.steps:
        raise RadioError(
            f"{where}.frozen_trunk_steps is {stage.frozen_trunk_steps}; it must lie between 0 and "
            f"{where}.steps, {stage.steps}"
        )
    if number == 0 and stage.refit:
        raise RadioError("stages[0].refit says nothing: the first stage always fits; take it away")
    earlier = set().union(*map(teachers_of, config.stages[:number]))
    new = teachers_of(stage) - earlier
    if number and new and not stage.refit:
        raise RadioError(
            f"{where} is the first with teacher {', '.join(sorted(new))}, whose standardizer is "
            f"not fitted yet; set {where}.refit=true"
        )


def _check_partition(config: Config, where: str, partition: PartitionConfig) -> None:
    patch = config.student.patch_size
    for size in (partition.image_size, *partition.image_sizes):
        if size < patch or size % patch:
            low = max(patch, size // patch * patch)
            key = "image_size" if size == partition.image_size else "image_sizes"
            raise RadioError(
                f"{where}.{key} has {size}, no multiple of student.patch_size {patch}; "
                f"the nearest are {low} and {low + patch}"
            )
    _check_window(config, where, partition)
    if partition.image_sizes and partition.image_size not in partition.image_sizes:
        raise RadioError(
            f"{where}.image_size is {partition.image_size}, the resolution that is measured, but "
            f"{where}.image_sizes, those that are trained, has only {partition.image_sizes}"
        )
    if partition.batch < 1:
        raise RadioError(f"{where}.batch is {partition.batch}; it must be at least 1")
    unknown = sorted(set(partition.views) - set(config.teachers))
    if unknown:
        known = ", ".join(sorted(config.teachers))
        raise RadioError(f"{where}.views names no teacher of this run: {unknown}; known: {known}")
    if not partition.views:
        raise RadioError(f"{where}.views is empty: name at least one teacher and its view mode")
    for teacher, mode in partition.views.items():
        _one_of(f"{where}.views.{teacher}", mode, VIEW_MODES)
        offered = config.teachers[teacher].card.view_modes
        if NEEDS.get(mode, mode) not in offered:
            usable = [known for known in VIEW_MODES if NEEDS.get(known, known) in offered]
            raise RadioError(
                f"{where}.views.{teacher} is '{mode}', but teacher '{teacher}' "
                f"({config.teachers[teacher].kind}) offers: {', '.join(usable)}"
            )
        weight = config.teachers[teacher].summary_weight
        if mode == "mosaic" and weight != 0:
            raise RadioError(
                f"{where}.views.{teacher} is 'mosaic', so teachers.{teacher}.summary_weight must "
                f"be 0 (it is {weight}): a canvas of several views has no summary of one view"
            )


def _check_window(config: Config, where: str, partition: PartitionConfig) -> None:
    """Refuse a window that does not tile every grid, or that meets token merging."""
    if partition.window is None:
        return
    merge = partition.merge_per_block
    if config.student.merge_per_block if merge is None else merge:
        raise RadioError(
            f"{where}.window goes with no token merging; set {where}.merge_per_block=0, or "
            f"{where}.window=null"
        )
    for size in (partition.image_size, *partition.image_sizes):
        side = size // config.student.patch_size
        if partition.window < 1 or side % partition.window:
            fits = ", ".join(str(w) for w in range(1, side + 1) if side % w == 0)
            raise RadioError(
                f"{where}.window is {partition.window}, but {size} px are {side} tokens along a "
                f"side; windows that fit: {fits}"
            )


def _one_of(key: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise RadioError(f"{key} is '{value}'; known: {', '.join(known)}")


def _explain(error: Exception) -> str:
    """Return Hydra's message and, for the usual slips, the way out."""
    missing = re.search(r"missing mandatory value: .*\n\s*full_key: (\S+)", str(error))
    if missing:
        experiments = ", ".join(choices("experiment"))
        return (
            f"{missing[1]} has no value; give {missing[1]}=... or choose an experiment "
            f"(experiment=NAME; there are: {experiments})"
        )
    text = str(error).strip()
    if error.__cause__ is not None and str(error.__cause__) not in text:
        text = f"{text}\n{error.__cause__}"
    if re.search("mismatched input|no viable alternative|LexerNoViableAlt|token recognition", text):
        text += (
            "\nA value with braces, commas or spaces needs quotes of its own inside the shell's: "
            "\"data.train='a-{0..9}.tar'\"; a path goes to a leaf such as data.train="
        )
    elif "Could not override" in text or "not in struct" in text or "not in 'Config'" in text:
        text += "\n`radio train --dry-run experiment=demo` prints every key that exists"
    elif "Could not find" in text:
        groups = ("experiment", "teacher", "student", "data", "cluster")
        text += "".join(f"\n{group}: {', '.join(choices(group))}" for group in groups)
    return text
