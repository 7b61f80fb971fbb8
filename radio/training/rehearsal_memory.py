"""What a rehearsal knows of memory: how much there is, how much was taken, what fits into it."""

from __future__ import annotations

import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from teachers import Teacher

BUDGET = 22_000_000_000  # bytes that a rehearsal takes at most
# Beside its weights a model needs this for a picture's activations, for its covariance, and for the
# libraries, with room to spare.
WORKING = 5_000_000_000
FLOAT32, BFLOAT16 = 4, 2  # bytes of a weight

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")
_MACHINE = Path("/proc/meminfo")


def reset_peak() -> None:
    """Begin a new measurement of the peak; without /proc it stays that since the start."""
    if _CLEAR.exists():
        _CLEAR.write_text("5")  # man proc_pid_clear_refs: reset the peak resident set size


def peak_bytes() -> int:
    """Return the most resident bytes of this process since `reset_peak`."""
    peak = _kilobytes(_STATUS, "VmHWM")
    if peak is not None:
        return peak
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def room(budget: int = BUDGET) -> int:
    """Return the bytes that this process may still take: of the budget, and of the machine."""
    own = _kilobytes(_STATUS, "VmRSS") or 0
    free = _kilobytes(_MACHINE, "MemAvailable")
    return budget - own if free is None else min(budget - own, free)


def bytes_needed(parameters: float, bytes_each: int) -> int:
    """Return what a model of so many parameters takes while it runs on one picture."""
    return int(parameters * bytes_each) + WORKING


def gigabytes(number: int) -> str:
    """Return bytes as people read them."""
    return f"{number / 1e9:,.1f} GB"


def millions(module: nn.Module) -> float:
    """Return a module's parameters in millions."""
    return sum(weight.numel() for weight in module.parameters()) / 1e6


@contextmanager
def without_weights() -> Iterator[None]:
    """Let modules built inside have parameters of no bytes (on meta), and buffers as always."""
    handle = register_module_parameter_registration_hook(_empty)  # type: ignore[arg-type]
    try:
        yield
    finally:
        handle.remove()


def _empty(_: nn.Module, __: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
    if parameter is None:
        return None
    return nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)


@torch.no_grad()
def draw_half(teacher: Teacher, seed: int) -> Teacher:
    """Give a teacher built `without_weights` seeded bfloat16 ones, and cast its pixels to them.

    Matrices are N(0, 0.02), biases 0, other vectors (norms, LayerScale) 1.
    """
    generator = torch.Generator().manual_seed(seed)
    for module in teacher.modules():
        for name, weight in list(module.named_parameters(recurse=False)):
            drawn = torch.empty(weight.shape, dtype=torch.bfloat16)
            if weight.ndim > 1:
                drawn.normal_(0, 0.02, generator=generator)
            else:
                drawn.fill_(0 if name.endswith("bias") else 1)
            setattr(module, name, nn.Parameter(drawn, requires_grad=False))
    teacher.register_forward_pre_hook(lambda _, pixels: (pixels[0].to(torch.bfloat16),))
    return teacher


def _kilobytes(file: Path, key: str) -> int | None:
    """Return one of /proc's lines in bytes, None where there is no such file."""
    if not file.exists():
        return None
    lines = (line.split() for line in file.read_text().splitlines())
    return next((int(words[1]) * 1024 for words in lines if words[0] == f"{key}:"), None)
