"""Reading upstream checkpoints: files, tags and what to say when neither works."""

from __future__ import annotations

import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

POCKET = Path(__file__).parent / "pocket"
WEIGHTS = "model.safetensors"
FILE_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")
_WRAPPERS = ("state_dict", "model", "teacher")


def shipped() -> dict[str, Path]:
    """Return the weights that this package brings along, by what `pretrained` calls them."""
    return {f"pocket_{path.parent.name}": path for path in sorted(POCKET.glob(f"*/{WEIGHTS}"))}


def local_file(name: str, pretrained: str) -> Path | None:
    """Return the checkpoint's path, also of shipped weights; None when `pretrained` is a tag.

    Raises ValueError when it is written like a file that does not exist.
    """
    if (own := shipped().get(pretrained)) is not None:
        return own
    path = Path(pretrained).expanduser()
    if path.is_file():
        return path
    if path.suffix in FILE_SUFFIXES:
        raise ValueError(
            f"teacher '{name}': checkpoint file '{pretrained}' does not exist; "
            "give the path of a downloaded file, a tag, or null for seeded weights"
        )
    return None


def load_state(path: Path) -> dict[str, Tensor]:
    """Read a state dict from a .safetensors or a torch file without running any pickled code.

    Unwraps `state_dict`, `model` and `teacher` and drops a `module.` prefix. Raises ValueError
    when the file is damaged or holds no tensors.
    """
    try:
        if path.suffix == ".safetensors":
            loaded: Any = load_file(path)
        else:
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, KeyError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"checkpoint '{path}' cannot be read ({reason}); "
            "expected a .safetensors file or a torch file of plain tensors: download it again"
        ) from error
    for wrapper in _WRAPPERS:
        if isinstance(loaded, Mapping) and isinstance(loaded.get(wrapper), Mapping):
            loaded = loaded[wrapper]
    tensors = _tensors(loaded)
    if not tensors:
        raise ValueError(
            f"checkpoint '{path}' holds no tensors; expected a state dict of name to tensor"
        )
    return {key.removeprefix("module."): value for key, value in tensors.items()}


def _tensors(loaded: object) -> dict[str, Tensor]:
    if not isinstance(loaded, Mapping):
        return {}
    return {str(key): value for key, value in loaded.items() if isinstance(value, Tensor)}


def load_strictly(name: str, module: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Load every weight of `module`; ValueError names the missing, unexpected or misshapen keys."""
    own = module.state_dict()
    missing = sorted(own.keys() - state.keys())
    unexpected = sorted(state.keys() - own.keys())
    misshapen = [
        f"{key} {tuple(state[key].shape)} instead of {tuple(own[key].shape)}"
        for key in sorted(own.keys() & state.keys())
        if own[key].shape != state[key].shape
    ]
    faults = {"missing": missing, "unexpected": unexpected, "wrong shapes": misshapen}
    told = "; ".join(
        f"{fault}: {', '.join(keys[:3])}" + (f" and {len(keys) - 3} more" if keys[3:] else "")
        for fault, keys in faults.items()
        if keys
    )
    if told:
        raise ValueError(
            f"teacher '{name}': checkpoint '{source}' is of another model ({told}); "
            "choose the options that fit it"
        )
    module.load_state_dict(dict(state))


def require_hub(name: str, tag: str, what: str) -> None:
    """Raise ValueError when downloads are switched off: say what to fetch and the way round."""
    offline = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
    switches = [key for key in offline if os.environ.get(key, "0").upper() in {"1", "ON", "TRUE"}]
    if switches:
        raise ValueError(
            f"teacher '{name}': pretrained '{tag}' must be downloaded, but {switches[0]} is set; "
            f"download {what} and give the local file's path as `pretrained`, "
            f"or unset {switches[0]}"
        )
