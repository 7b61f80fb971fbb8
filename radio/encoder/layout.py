"""NVIDIA's layout as radio.encoder reads it: the backbone's key maps are student's.

Here are the heads' keys, and those key maps that may refuse weights, with a user's error.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import ParamSpec, TypeVar

from torch import Tensor

from radio.errors import RadioError
from student import radio_layout

P = ParamSpec("P")
R = TypeVar("R")

# What an attention head consists of, as timm's blocks and an MLP of version 2 name it.
ATTENTION_HEAD = {
    f"{part}.{kind}"
    for block in ("blocks.0.", "blocks.1.")
    for part in (f"{block}{name}" for name in ("norm1", "norm2", "attn.proj", "mlp.fc1", "mlp.fc2"))
    for kind in ("weight", "bias")
}
ATTENTION_HEAD |= {
    f"blocks.{i}.{key}" for i in (0, 1) for key in ("attn.qkv.weight", "ls1.gamma", "ls2.gamma")
}
ATTENTION_HEAD |= {
    f"mlp.{part}.{kind}" for part in ("fc1", "final.0", "final.2") for kind in ("weight", "bias")
}


def _readable(function: Callable[P, R]) -> Callable[P, R]:
    """Return the function with RadioError in the place of student's ValueError."""

    @functools.wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return function(*args, **kwargs)
        except ValueError as error:
            raise RadioError(str(error)) from error

    return wrapped


clean_backbone = _readable(radio_layout.clean_backbone)
from_disk = _readable(radio_layout.from_disk)
from_hub = _readable(radio_layout.from_hub)
materialise_spectral = _readable(radio_layout.materialise_spectral)


def last_linear(head: Mapping[str, Tensor]) -> str:
    """Return where a head's last Linear lies: `final.2`, or `mlp.final.2` of an attention head."""
    return "mlp.final.2" if "mlp.final.2.weight" in head else "final.2"


def head_problem(state: Mapping[str, Tensor]) -> str | None:
    """Return why no adaptor can hold a head of NVIDIA's, or None: MLP version 2 and attention."""
    if "mlp.fc1.weight" in state:
        strange = sorted(set(state) ^ ATTENTION_HEAD)
        return f"it is an attention head of another layout ({strange[0]})" if strange else None
    if "pre_norm.0.weight" in state:
        return "its MLP begins with a norm"
    if "fc2.weight" in state:
        return "it is an MLP of version 1 (ReLU)"
    if not {"fc1.weight", "final.2.weight"} <= set(state):
        return f"its layout is unknown ({', '.join(sorted(state)[:3])}, ...)"
    return None
