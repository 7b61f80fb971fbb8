"""What identifies a cached target: a hash of everything that decides its bits.

Dataclasses are hashed whole, less what is named here, so that a field that is added later counts
until somebody says that it does not.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from radio.config import Config
from radio.data.plan import PartitionSpec
from radio.data.shards import ImageSource
from radio.errors import RadioError
from radio.files import sha256_of
from radio.targets.entries import key_of
from radio.targets.target_maker import CodedTarget, Request

RECIPE = 1  # raise it when TargetMaker comes to make other targets of the same values

STUDENT_ONLY = ("name", "merge_per_block", "window")  # of a PartitionSpec
LOSS_ONLY = ("summary_weight", "feature_weight", "standardizer", "card")  # of a TeacherConfig
NOT_THE_VIEWS = ("train", "val", "repeat_epochs", "max_damaged")  # of a DataConfig


def identity(config: Config, name: str) -> str:
    """Return what is known of a teacher before it is built, hashed: its configuration and files.

    A value that names a file or folder stands for the bytes in it; a tag stands for itself.

    Raises:
        RadioError: a file cannot be read.
    """
    teacher = _without(asdict(config.teachers[name]), LOSS_ONLY)
    teacher["options"] = {key: _content(name, value) for key, value in teacher["options"].items()}
    teacher = {key: _content(name, value) for key, value in teacher.items()}
    return key_of({"seed": config.seed, "teacher": teacher})


def target_key(
    config: Config,
    name: str,
    teacher: tuple[str, str],
    source: ImageSource,
    partition: PartitionSpec,
    request: Request,
) -> str:
    """Return the key of one teacher's target of one partition.

    Args:
        config: the run.
        name: the teacher's name in it, which also draws the offsets of its crops.
        teacher: its (identity, fingerprint).
        source: the pictures of the request's split.
        partition: the views in their order, and the teacher's view mode.
        request: the codec, and the file of the teacher's standardizer, of which the hash counts.
    """
    shown = replace(partition, modes={name: partition.modes[name]})
    standardizer = request.standardizers.get(name)
    return key_of(
        {
            "recipe": RECIPE,
            "kept": [field.name for field in fields(CodedTarget)],
            "teacher": teacher,
            "seed": config.seed,
            "views": _without(asdict(config.data), NOT_THE_VIEWS),
            "patch_size": config.student.patch_size,
            "grid": config.losses.grid,
            "pictures": source.fingerprint,
            "keys": [source.key(view.sample) for view in partition.views],
            "partition": _without(asdict(shown), STUDENT_ONLY),
            "request": _without(asdict(request), ("split", "standardizers")),
            "standardizer": None if standardizer is None else standardizer.sha256,
        }
    )


def _without(values: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name not in names}


def _content(teacher: str, value: Any) -> Any:
    """Return a path's content as a hash, and anything else as it is."""
    if not isinstance(value, str) or not value:
        return value
    path = Path(value).expanduser()
    try:
        if path.is_file():
            return {"file": sha256_of(path)}
        if path.is_dir():
            return {"folder": _hash_of_folder(path)}
    except OSError as error:
        raise RadioError(f"teachers.{teacher}: cannot read '{value}': {error}") from error
    return value


def _hash_of_folder(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            name = os.fsencode(path.relative_to(folder))
            digest.update(name + f" {sha256_of(path)}\n".encode())
    return digest.hexdigest()
