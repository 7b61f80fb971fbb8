"""What every benchmark writes beside its figures: commit, machine, versions."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "ray", "timm", "open_clip_torch", "transformers")


def machine() -> dict[str, Any]:
    """Return the processor, its usable cores, load and memory."""
    cpu = platform.processor() or "unknown"
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.split(":")[1].strip() for line in lines if "model name" in line), cpu)
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "load_1m": os.getloadavg()[0],
        "python": platform.python_version(),
    }


def circumstances() -> dict[str, Any]:
    """Return commit, machine and versions."""
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--exclude=*"],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent,
        check=False,
    ).stdout.strip()
    versions = {package: importlib.metadata.version(package) for package in PACKAGES}
    return {"commit": commit, "machine": machine(), "versions": versions}


def write(name: str, figures: dict[str, Any]) -> Path:
    """Write benchmarks/results/<name>.json and print it."""
    result = {**circumstances(), **figures}
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    text = json.dumps(result, indent=2) + "\n"
    path.write_text(text)
    print(text)
    return path
