"""What contradicts itself in a configuration, said before anything is started."""

from __future__ import annotations

from collections.abc import Sequence

from radio.errors import RadioError
from radio.schema import Config, PartitionConfig, PoolConfig, TeacherConfig, teachers_of

STREAMS = ("local", "ray")
PRECISIONS = ("float32", "bf16")
STRATEGIES = ("PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD")
VIEW_MODES = ("native", "match", "mosaic", "padded", "tiled", "sharpened")
NEEDS = {"tiled": "native", "sharpened": "native", "padded": "mosaic"}  # of a teacher's own modes
PLACEMENTS = ("together", "by_rank")
PARALLEL_KINDS = ("ddp", "fsdp")
SQUARE = ("mosaic", "padded", "tiled")
GRIDS = ("coarser", "larger")


def check(config: Config) -> None:
    """Refuse what cannot run, naming the keys, before anything is started."""
    _one_of("stream", config.stream, STREAMS)
    _one_of("student.precision", config.student.precision, PRECISIONS)
    _one_of("losses.grid", config.losses.grid, GRIDS)
    _check_shifts(config)
    _check_parallel(config)
    _check_students(config)
    _check_cache(config)
    _check_cluster(config)
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
    for name, teacher in config.teachers.items():
        _check_teacher(config, name, teacher)
    unused = set(config.teachers) - set().union(*map(teachers_of, config.stages))
    if unused:
        names = ", ".join(sorted(unused))
        raise RadioError(
            f"no stage has views for teacher {names}; give it a view mode in a partition "
            f"(stages.0.partitions.NAME.views), or take it out with ~teachers.{min(unused)}"
        )


def _check_teacher(config: Config, name: str, teacher: TeacherConfig) -> None:
    patch, where = config.student.patch_size, f"teachers.{name}"
    _one_of(f"{where}.precision", teacher.precision, PRECISIONS)
    if teacher.micro_batch is not None and teacher.micro_batch < 1:
        raise RadioError(f"{where}.micro_batch is {teacher.micro_batch}; it must be at least 1")
    if teacher.upsample < 1 or patch % teacher.upsample:
        raise RadioError(
            f"{where}.upsample is {teacher.upsample}; it must divide student.patch_size, {patch}"
        )
    modes = {
        mode
        for stage in config.stages
        for partition in stage.partitions.values()
        for who, mode in partition.views.items()
        if who == name
    }
    if teacher.upsampler is not None and "sharpened" not in modes:
        raise RadioError(
            f"{where}.upsampler is read in view mode 'sharpened' only, but no partition has it; "
            f"set a partition's views.{name}=sharpened, or {where}.upsampler=null"
        )


def _check_shifts(config: Config) -> None:
    margin, mesa = config.data.shift_margin, config.losses.mesa_weight
    if margin < 0:
        raise RadioError(f"data.shift_margin is {margin}; it must be 0 (no shifts) or more patches")
    if mesa and not margin:
        raise RadioError(
            f"losses.mesa_weight is {mesa}, but with data.shift_margin=0 the student and its "
            "average see the same crop; set data.shift_margin=2, for example, or "
            "losses.mesa_weight=0"
        )
    if mesa and config.optimizer.ema_decay is None:
        raise RadioError(
            f"losses.mesa_weight is {mesa}, but there is no average to compare with; set "
            "optimizer.ema_decay=0.999, for example, or losses.mesa_weight=0"
        )
    if "average" in config.teachers:
        raise RadioError(
            "teachers.average: the losses of the student's own average have this name; choose "
            "another name for the teacher"
        )


def _check_parallel(config: Config) -> None:
    parallel, kind = config.parallel, config.parallel.kind
    _one_of("parallel.placement", parallel.placement, PLACEMENTS)
    for number, stage in enumerate(config.stages):
        for name, partition in stage.partitions.items():
            size = parallel.micro_shard
            if size is not None and (size < 1 or partition.batch % size):
                raise RadioError(
                    f"parallel.micro_shard is {size}, which does not divide "
                    f"stages[{number}].partitions.{name}.batch, {partition.batch}"
                )
    if parallel.workers is not None or parallel.min_workers is not None or parallel.labels:
        _check_workers(config)
    if kind is None:
        if parallel.placement != "together":
            raise RadioError(
                f"parallel.placement={parallel.placement} needs several processes, but "
                "parallel.kind is null; set parallel.kind=ddp or fsdp"
            )
        return
    _one_of("parallel.kind", kind, PARALLEL_KINDS)
    wanted = {
        "losses.balance=teacher_dropping": config.losses.balance == "teacher_dropping",
        "stream=ray without parallel.workers": config.stream == "ray" and parallel.workers is None,
    }
    if kind == "fsdp":
        wanted |= {
            "optimizer.ema_decay": config.optimizer.ema_decay is not None,
            "student.spectral=true": config.student.spectral,
            "student.backbone": config.student.backbone is not None,
        }
    for key, found in wanted.items():
        if found:
            raise RadioError(f"parallel.kind={kind} does not go with {key}; change one of the two")


def _check_cache(config: Config) -> None:
    if config.cache is not None and config.data.repeat_epochs < 1:
        raise RadioError(
            f"cache={config.cache} keeps targets to find them again, but with data.repeat_epochs=0 "
            "no view comes back; set data.repeat_epochs=1 or more, or cache=null"
        )


def _check_workers(config: Config) -> None:
    parallel = config.parallel
    if parallel.workers is None:
        raise RadioError(
            "parallel.min_workers and parallel.labels are about parallel.workers, which is null; "
            "set it, or take them away"
        )
    if parallel.kind is None or config.stream != "ray":
        raise RadioError(
            f"parallel.workers={parallel.workers} are processes of Ray Train: set stream=ray and "
            "parallel.kind=ddp or fsdp, or parallel.workers=null"
        )
    least = parallel.min_workers
    if parallel.workers < 1 or (least is not None and not 1 <= least <= parallel.workers):
        raise RadioError(
            f"parallel.workers is {parallel.workers} and parallel.min_workers {least}; expected "
            "1 <= min_workers <= workers"
        )


def _check_cluster(config: Config) -> None:
    cluster = config.cluster
    least = {
        "replicas": (cluster.replicas, 1),
        "window": (1 if cluster.window is None else cluster.window, 1),
        "feeders": (cluster.feeders, 0),
        "cpus": (cluster.cpus, 1),
        "object_store_mb": (cluster.object_store_mb, 80),  # Ray takes no smaller one
    }
    for key, (value, lowest) in least.items():
        if value < lowest:
            raise RadioError(f"cluster.{key} is {value}; it must be at least {lowest}")
    for key in ("call_timeout_seconds", "give_up_seconds"):
        if not getattr(cluster, key) > 0:
            raise RadioError(f"cluster.{key} is {getattr(cluster, key)}; it must be above 0")
    if cluster.address is not None and config.stream != "ray":
        raise RadioError(
            f"cluster.address is {cluster.address}, but stream={config.stream} keeps the teachers "
            "in this process; add stream=ray, or leave cluster.address out"
        )
    if cluster.hedge is not None and cluster.hedge < 1:
        raise RadioError(
            f"cluster.hedge is {cluster.hedge}: a teacher would be asked twice before its usual "
            "time is over; give 1 or more, or null to ask never"
        )
    unknown = sorted(set(cluster.pools) - set(config.teachers))
    if unknown:
        known = ", ".join(sorted(config.teachers))
        raise RadioError(f"cluster.pools names no teacher of this run: {unknown}; known: {known}")
    for name, pool in cluster.pools.items():
        _check_pool(f"cluster.pools.{name}", pool)


def _check_pool(where: str, pool: PoolConfig) -> None:
    if pool.replicas is not None and pool.replicas < 1:
        raise RadioError(f"{where}.replicas is {pool.replicas}; it must be at least 1")
    if min(pool.cpus, pool.gpus or 0, pool.memory_mb or 0) < 0:
        raise RadioError(f"{where}: cpus, gpus and memory_mb cannot be negative")
    if pool.gpus is not None and pool.gpus > 1 and pool.gpus != int(pool.gpus):
        raise RadioError(f"{where}.gpus is {pool.gpus}; give a share of one, or whole ones")
    if pool.strategy is not None:
        _one_of(f"{where}.strategy", pool.strategy, STRATEGIES)


def _check_students(config: Config) -> None:
    for name, student in config.students.items():
        if student.patch_size != config.student.patch_size:
            raise RadioError(
                f"students.{name}.patch_size is {student.patch_size} and student.patch_size "
                f"{config.student.patch_size}; students of one teacher pass have one grid"
            )
        if "/" in name or name in ("", ".", ".."):
            raise RadioError(f"students.{name}: the name becomes a folder; use letters and digits")


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
    _check_trunk(config, where, partition)
    _check_window(config, where, partition)
    _check_aspects(where, partition)
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


def _check_trunk(config: Config, where: str, partition: PartitionConfig) -> None:
    """Refuse what only our own ViT does."""
    backbone, merge = config.student.backbone, partition.merge_per_block
    if backbone is None:
        return
    merge = config.student.merge_per_block if merge is None else merge
    wanted = {
        f"{where}.merge_per_block": merge,
        f"{where}.window": partition.window,
        f"{where}.windows": partition.windows,
    }
    for key, value in wanted.items():
        if value:
            raise RadioError(
                f"{key} is {value}, but student.backbone={backbone} is not our ViT and has no "
                f"such thing; set {key} to 0 or null, or student.backbone=null"
            )


def _check_aspects(where: str, partition: PartitionConfig) -> None:
    if not partition.aspects:
        return
    if min(partition.aspects) <= 0:
        raise RadioError(
            f"{where}.aspects is {partition.aspects}; each is a view's width over its height, "
            "for example [0.75, 1.0, 1.333]"
        )
    squares = sorted(name for name, mode in partition.views.items() if mode in SQUARE)
    if squares:
        mode = partition.views[squares[0]]
        raise RadioError(
            f"{where}.aspects gives views that are not square, but {where}.views.{squares[0]} is "
            f"'{mode}', which needs squares; set {where}.aspects=[] or another view mode"
        )
    if partition.window is not None:
        raise RadioError(
            f"{where}.aspects gives grids that {where}.window={partition.window} may not tile; "
            f"set {where}.aspects=[] or {where}.window=null"
        )


def _check_window(config: Config, where: str, partition: PartitionConfig) -> None:
    """Refuse a window that does not tile every grid, or that meets token merging."""
    if partition.window is None and not partition.windows:
        return
    merge = partition.merge_per_block
    if config.student.merge_per_block if merge is None else merge:
        raise RadioError(
            f"{where}.window goes with no token merging; set {where}.merge_per_block=0, or "
            f"{where}.window=null and {where}.windows=[]"
        )
    if any(window < 0 for window in partition.windows):
        raise RadioError(f"{where}.windows is {partition.windows}; each is 0 (none) or more tokens")
    if partition.window is None:
        return
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
