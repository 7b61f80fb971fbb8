"""Every YAML key as a typed field. Values live in `configs/*.yaml`, defaults here only."""

from __future__ import annotations

import dataclasses
from typing import Any

from omegaconf import MISSING


@dataclasses.dataclass
class ThreadsConfig:
    """Real CPU threads of each process; part of what decides a training step's low bits."""

    student: int = 2
    teacher: int = 1


@dataclasses.dataclass
class PoolConfig:
    """Where the replicas of one teacher live.

    A replica reserves `cpus`, `gpus` (shares too; null: 1 on CUDA, else 0) and `memory_mb` of a
    node that has all of `labels` (`ray start --labels`); with a `strategy` their places
    are chosen together (PACK, SPREAD, STRICT_PACK, STRICT_SPREAD).
    """

    replicas: int | None = None  # null: cluster.replicas
    cpus: float = 1.0
    gpus: float | None = None
    memory_mb: int | None = None
    labels: dict[str, str] = dataclasses.field(default_factory=dict)
    strategy: str | None = None


@dataclasses.dataclass
class ClusterConfig:
    """Which Ray cluster: null is RAY_ADDRESS or else local, a new one of `cpus` logical CPUs.

    At most `window` steps are in flight (null: one more than a teacher has replicas), fewer where
    their bytes would not fit the object store. What was asked of a replica that is silent for
    `hedge` times the usual seconds of a pass is asked of another one, too (null: never).
    `call_timeout_seconds` is more than a teacher's pass over a whole step; with several student
    processes more than `window` of them.
    """

    address: str | None = None
    cpus: int = 8
    object_store_mb: int = 1024
    replicas: int = 1
    pools: dict[str, PoolConfig] = dataclasses.field(default_factory=dict)  # by teacher
    feeders: int = 0  # processes that decode pictures once for all; 0: each reads for itself
    window: int | None = None
    hedge: float | None = 3.0
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
    shift_margin: int = 0  # patches by which a crop is larger than what student or teacher sees


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
    init: str | None = None  # a timm ViT's name, its weight file, or an encoder to start from
    backbone: str | None = None  # a timm model in the place of our ViT
    compile: bool = False  # torch.compile of the backbone's blocks, once per shape of the stages
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
    upsample: int = 1  # the adaptor predicts a grid this many times finer than the patches
    upsampler: str | None = None  # exported program (.pt2) of view mode sharpened; else bicubic
    compile: bool = False
    precision: str = "float32"  # of its forward: float32, bf16
    micro_batch: int | None = None  # pictures (or canvases) per forward; null: data.micro_batch
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
    mesa_weight: float = 0.0  # of the student's features against its average's (SE-MESA)
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

    With `image_sizes` every step draws one of them (C-RADIOv4), with `aspects` one width over
    height at about the same area, with `windows` one of those that tile its grid (0: none); the
    square of `image_size` with `window` is what is measured.
    """

    image_size: int = MISSING
    batch: int = MISSING
    views: dict[str, str] = MISSING
    merge_per_block: int | None = None  # null: student.merge_per_block
    image_sizes: list[int] = dataclasses.field(default_factory=list)
    aspects: list[float] = dataclasses.field(default_factory=list)
    window: int | None = None  # tokens along a window's side; null: attention is global
    windows: list[int] = dataclasses.field(default_factory=list)


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
class ParallelConfig:
    """How the student's processes share a step; null `kind` is one process.

    They are torchrun's, or with stream=ray `workers` of Ray Train on nodes that have all of
    `labels`, which goes on with no fewer than `min_workers` where the cluster has not room for all
    (null: it waits for them).

    The views of a partition are laid out in micro-shards that a rank takes whole; with placement
    by_rank a rank has those of one partition only.
    """

    kind: str | None = None  # ddp, fsdp
    placement: str = "together"
    micro_shard: int | None = None  # views; null: the whole batch is one
    workers: int | None = None
    min_workers: int | None = None
    labels: dict[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class Config:
    """A run."""

    out: str = MISSING
    seed: int = 0
    stream: str = "local"
    cache: str | None = None  # folder in which targets are kept and found again
    rehearsal: bool = False  # one real-size step on random weights, to see what it takes
    codec: str = "bf16"
    device: str = "auto"
    log_every_steps: int = 1
    tensorboard: bool = False  # metrics in out/tensorboard, too
    threads: ThreadsConfig = dataclasses.field(default_factory=ThreadsConfig)
    cluster: ClusterConfig = dataclasses.field(default_factory=ClusterConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    student: StudentConfig = dataclasses.field(default_factory=StudentConfig)
    students: dict[str, StudentConfig] = dataclasses.field(default_factory=dict)
    teachers: dict[str, TeacherConfig] = dataclasses.field(default_factory=dict)
    fit: FitConfig = dataclasses.field(default_factory=FitConfig)
    losses: LossConfig = dataclasses.field(default_factory=LossConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)
    evaluation: EvaluationConfig = dataclasses.field(default_factory=EvaluationConfig)
    parallel: ParallelConfig = dataclasses.field(default_factory=ParallelConfig)
    stages: list[StageConfig] = MISSING


def teachers_of(stage: StageConfig) -> set[str]:
    """Return the names of the teachers that a stage's partitions are matched to."""
    return {name for partition in stage.partitions.values() for name in partition.views}
