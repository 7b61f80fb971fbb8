"""What this machine can run, and what is missing."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

PACKAGES = (
    "torch", "torchvision", "ray", "timm", "open_clip_torch", "segment-anything", "transformers",
    "webdataset", "hydra-core", "pyarrow", "safetensors",
)  # fmt: skip
DEMO_PACKAGES = ("scikit-image", "scikit-learn")
DEMO_MEMORY_GB = 8.0
DEMO_DISK_GB = 2.0


@dataclass(frozen=True)
class Finding:
    """One line: what was looked at, what was found, and whether it is as it should be."""

    what: str
    found: str
    fine: bool
    way_out: str = ""


def examine() -> list[Finding]:
    """Look at Python, the packages, the processors, memory, disk and the name `teachers`."""
    findings = [_python(), *(_package(name, "pip install radio-distill") for name in PACKAGES)]
    findings += [_package(name, 'pip install "radio-distill[demo]"') for name in DEMO_PACKAGES]
    return [*findings, _shadowing(), _processors(), _accelerator(), _memory(), _disk()]


def shadowing_package() -> str | None:
    """Return the path of a foreign `teachers`, `student` or `ray_jobs` that hides ours."""
    home = Path(__file__).resolve().parents[1]
    for name in ("teachers", "student", "ray_jobs"):
        spec = importlib.util.find_spec(name)
        origin = Path(spec.origin).resolve() if spec and spec.origin else None
        if origin is None or origin.parents[1] != home:
            return f"{name} is {origin or 'not importable'}, expected {home / name}"
    return None


def _python() -> Finding:
    fine = sys.version_info >= (3, 11)
    return Finding("python", platform.python_version(), fine, "install Python 3.11 or newer")


def _package(name: str, way_out: str) -> Finding:
    try:
        return Finding(name, importlib.metadata.version(name), True)
    except importlib.metadata.PackageNotFoundError:
        return Finding(name, "missing", False, way_out)


def _shadowing() -> Finding:
    hidden = shadowing_package()
    way_out = "use a virtual environment of its own; another package has the same name"
    return Finding("our packages", hidden or "in one place", hidden is None, way_out)


def _processors() -> Finding:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    flags = _cpu_flags()
    known = [name for name in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if name in flags]
    return Finding("processors", f"{usable} ({', '.join(known) or 'no vector flags seen'})", True)


def _cpu_flags() -> set[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return set()  # not Linux
    return next((set(line.split()) for line in lines if line.startswith("flags")), set())


def _accelerator() -> Finding:
    import torch  # three seconds, and only this line needs it

    if not torch.cuda.is_available():
        return Finding("accelerator", "none: everything runs on the CPU", True)
    names = {torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())}
    return Finding("accelerator", f"{torch.cuda.device_count()} x {', '.join(names)}", True)


def _memory() -> Finding:
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    except (ValueError, OSError):
        return Finding("memory", "unknown", True)
    way_out = f"`radio demo` wants {DEMO_MEMORY_GB:.0f} GB; use stream=local, one process"
    return Finding("memory", f"{total:.1f} GB", total >= DEMO_MEMORY_GB, way_out)


def _disk() -> Finding:
    free = shutil.disk_usage(".").free / 2**30
    return Finding("disk here", f"{free:.1f} GB free", free >= DEMO_DISK_GB, "free some space")
