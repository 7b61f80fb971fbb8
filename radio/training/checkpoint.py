"""Checkpoints: whole or not there at all.

    checkpoints/step-000120/{model,optimizer,standardizers,...}.safetensors
                            state.yaml  config.yaml  SHA256SUMS

A checkpoint is written under a temporary name, synced and renamed, so a folder called `step-*` is
complete. No random state is inside: each step reseeds itself.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from safetensors.torch import load_file
from torch import Tensor

from radio.config import Config, from_yaml, to_yaml
from radio.errors import RadioError
from radio.files import save_tensors, sha256_of, sync
from radio.targets.standardize import Standardizer, load_standardizers, save_standardizers

SUMS = "SHA256SUMS"
TENSORS = ("model", "optimizer", "ema", "balance")  # the last two where the run has them


@dataclass(frozen=True)
class Checkpoint:
    """What a `step-*` folder holds; `tensors` by file: model, optimizer, perhaps ema, balance."""

    path: Path
    step: int
    tensors: dict[str, dict[str, Tensor]]
    standardizers: dict[str, Standardizer]
    config: Config
    state: dict[str, Any]

    @property
    def model(self) -> dict[str, Tensor]:
        """The state dict of the student to evaluate and fuse: the average where there is one."""
        return self.tensors.get("ema", self.tensors["model"])

    @property
    def views_seen(self) -> int:
        """The views that the student was trained on before this checkpoint was written."""
        left, views = self.step, 0
        for stage in self.config.stages:
            steps = min(left, stage.steps)
            views += steps * sum(partition.batch for partition in stage.partitions.values())
            left -= steps
        return views


def save_checkpoint(
    folder: Path,
    step: int,
    tensors: Mapping[str, Mapping[str, Tensor]],
    standardizers: Mapping[str, Standardizer],
    config: Config,
    state: Mapping[str, Any],
    keep: int,
) -> Path:
    """Write `folder/step-<step>` atomically, then drop all but the newest `keep`.

    Raises:
        RadioError: the disk is full; earlier checkpoints are untouched.
    """
    final = folder / f"step-{step:06d}"
    if final.exists():
        return final
    temporary = folder / f".tmp-step-{step:06d}-{os.getpid()}"
    try:
        temporary.mkdir(parents=True)
        _write(temporary, step, tensors, standardizers, config, state)
        os.rename(temporary, final)
        sync(folder)
    except (OSError, RuntimeError) as error:  # safetensors reports I/O as its own RuntimeError
        shutil.rmtree(temporary, ignore_errors=True)
        raise _explained(error, folder) from error
    _prune(folder, keep)
    return final


def _write(
    folder: Path,
    step: int,
    tensors: Mapping[str, Mapping[str, Tensor]],
    standardizers: Mapping[str, Standardizer],
    config: Config,
    state: Mapping[str, Any],
) -> None:
    for name, state_dict in tensors.items():
        contiguous = {key: tensor.contiguous() for key, tensor in state_dict.items()}
        save_tensors(contiguous, folder / f"{name}.safetensors")
    save_standardizers(folder / "standardizers.safetensors", dict(standardizers), {})
    (folder / "state.yaml").write_text(yaml.safe_dump({"step": step, **state}, sort_keys=False))
    (folder / "config.yaml").write_text(to_yaml(config))
    write_sums(folder)
    for path in folder.iterdir():
        sync(path)
    sync(folder)


def write_sums(folder: Path) -> None:
    """Write SHA256SUMS over every file of a folder, readable by `sha256sum -c`."""
    names = sorted(path.name for path in folder.iterdir() if path.name != SUMS)
    lines = [f"{sha256_of(folder / name)}  {name}\n" for name in names]
    (folder / SUMS).write_text("".join(lines))


def check_sums(folder: Path) -> None:
    """Refuse a folder whose files are not those that were written, naming the file."""
    sums = folder / SUMS
    if not sums.exists():
        raise RadioError(f"{folder} has no {SUMS}: not a checkpoint, or not a whole one")
    for line in sums.read_text().splitlines():
        digest, name = line.split(maxsplit=1)
        path = folder / name
        if not path.exists() or sha256_of(path) != digest:
            raise RadioError(
                f"{path} is missing or damaged; delete {folder} to resume from the checkpoint "
                "before it"
            )


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a `step-*` folder after checking every file's sum."""
    if not path.is_dir():
        raise RadioError(f"{path} is no checkpoint folder (expected .../checkpoints/step-000120)")
    check_sums(path)
    state = yaml.safe_load((path / "state.yaml").read_text())
    names = {file.stem for file in path.glob("*.safetensors")}
    return Checkpoint(
        path,
        int(state["step"]),
        {name: load_file(path / f"{name}.safetensors") for name in TENSORS if name in names},
        load_standardizers(path / "standardizers.safetensors"),
        from_yaml((path / "config.yaml").read_text()),
        state,
    )


def find_checkpoint(target: Path) -> Checkpoint:
    """Load the checkpoint that a path means: a `step-*` folder, or a run's newest."""
    if (target / "state.yaml").exists():
        return load_checkpoint(target)
    newest = newest_checkpoint(target / "checkpoints")
    if newest is None:
        raise RadioError(
            f"{target} is neither a run folder with checkpoints nor a checkpoint; expected for "
            "example runs/demo or runs/demo/checkpoints/step-000060"
        )
    return load_checkpoint(newest)


def newest_checkpoint(folder: Path) -> Path | None:
    """Return the `step-*` folder with the highest step, or None."""
    return max(folder.glob("step-*"), key=lambda path: path.name, default=None)


def _prune(folder: Path, keep: int) -> None:
    for path in sorted(folder.glob("step-*"))[: -max(1, keep)]:
        shutil.rmtree(path)
    for path in folder.glob(".tmp-*"):  # left by a process that was killed while saving
        shutil.rmtree(path, ignore_errors=True)


def _explained(error: Exception, folder: Path) -> RadioError:
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    if full or "No space left" in str(error):
        newest = newest_checkpoint(folder)
        kept = f"{newest.name} is whole" if newest else "no earlier checkpoint exists"
        return RadioError(
            f"disk full while saving to {folder} ({kept}); free space and start the same command "
            "again, or lower checkpoint.keep"
        )
    return RadioError(f"cannot save a checkpoint to {folder}: {error}")
