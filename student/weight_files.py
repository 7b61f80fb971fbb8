"""Weight files: tensors by name, and nothing else that a file may hold is ever run."""

from __future__ import annotations

import argparse
import pickle
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from student.radio_layout import State

SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".tar")
WRAPPERS = ("state_dict_ema", "state_dict", "model")  # the average first, as timm and NVIDIA do


def read_file(path: Path) -> tuple[State, dict[str, Any]]:
    """Return a file's tensors and the arguments of its run ({} unless it is a training's file).

    ValueError for what is neither safetensors nor a pickle of tensors (and an argparse.Namespace,
    which NVIDIA's `.pth.tar` hold).
    """
    if path.suffix == ".safetensors":
        return read_safetensors(path), {}
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            contents = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} holds more than tensors, and unpickling that would run its code; "
            "save the model's state_dict() as safetensors."
        ) from error
    except (EOFError, OSError, RuntimeError) as error:
        raise ValueError(f"{path} is no whole weight file ({error}); get it again.") from error
    if not isinstance(contents, dict):
        raise ValueError(f"{path} holds a {type(contents).__name__}, expected a state dict.")
    found = (contents[name] for name in WRAPPERS if isinstance(contents.get(name), dict))
    state: dict[str, Any] = next(found, contents)
    args = contents.get("args")
    tensors = {
        name.removeprefix("module."): value  # DistributedDataParallel's
        for name, value in state.items()
        if isinstance(value, Tensor)
    }
    return tensors, vars(args) if isinstance(args, argparse.Namespace) else {}


def read_safetensors(path: Path) -> State:
    """Return the tensors of a safetensors file; ValueError for a broken one."""
    try:
        tensors: State = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is no whole safetensors file ({error}); get it again.") from error
    return tensors
