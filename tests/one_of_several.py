"""One process of a tiny run; torchrun starts several. Keeps the gradients of the first step.

python one_of_several.py ROOT GRADIENTS.safetensors {"parallel.kind": "ddp", ...}
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tiny import tiny_config
from torch.optim.optimizer import register_optimizer_step_pre_hook

from radio.config import Config
from radio.training.distill import distill
from radio.training.parallel import whole


def shared_config(root: Path, options: dict[str, Any]) -> Config:
    """Return the tiny run in micro-shards of two views, with `section.key` options."""
    config = tiny_config(root, steps=2)
    config.parallel.micro_shard = 2
    config.optimizer.name = "sgd"
    config.optimizer.clip_norm = None
    config.stages[0].partitions["low"].batch = 8
    config.stages[0].partitions["high"].batch = 4
    config.threads.student = config.threads.teacher = 1
    if options.pop("two_stages", False):
        config.stages.append(replace(config.stages[0], steps=1, refit=True))
    for key, value in options.items():
        section, _, field = key.rpartition(".")
        setattr(getattr(config, section) if section else config, field, value)
    return config


def train(root: Path, gradients: Path, options: dict[str, Any]) -> None:
    """Train the run of `shared_config` and write its first step's gradients."""
    config = shared_config(root, dict(options))
    kept: dict[str, torch.Tensor] = {}

    def keep(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        if kept:
            return
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        kept.update(
            {
                f"{number:04d}": whole(parameter.grad.detach()).clone()
                for number, parameter in enumerate(parameters)
                if parameter.grad is not None
            }
        )

    hook = register_optimizer_step_pre_hook(keep)
    try:
        distill(config)
    finally:
        hook.remove()
    if os.environ.get("RANK", "0") == "0":
        save_file(kept, gradients)


if __name__ == "__main__":
    train(Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3]))
