"""The wheel: what ships, and that it works without the repository."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
POCKET = ("clip", "siglip", "dinov2", "sam")
USED = """
import torch, radio, teachers
assert {site!r} in radio.__file__ and {site!r} in teachers.__file__
picture = torch.zeros(1, 3, 128, 128, dtype=torch.uint8)
said = radio.load("pocket").encode(picture, features=("sam:features",))
assert said["sam:features"].shape == (1, 64, 192)
"""


@pytest.mark.slow
def test_the_wheel_has_the_pocket_weights_and_works_without_the_repository(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*build, "-w", str(tmp_path), str(ROOT)], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        sizes = {info.filename: info.file_size for info in archive.infolist()}
    for name in POCKET:
        weights = [f for f in sizes if f.startswith(f"teachers/pocket/{name}/")]
        assert any(f.endswith(".safetensors") and sizes[f] <= 10e6 for f in weights), weights
        assert f"teachers/pocket/{name}/README.md" in sizes
    assert 0 < sizes["radio/encoder/pocket/model.safetensors"] <= 15e6
    top = {name.split("/")[0] for name in sizes if ".dist-info" not in name}
    assert top == {"radio", "teachers", "student", "ray_jobs"}
    site = tmp_path / "site"
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target"]
    subprocess.run([*install, str(site), str(wheel)], check=True)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    env = {**os.environ, "PYTHONPATH": str(site)}
    command = [sys.executable, "-c", USED.format(site=str(site))]
    subprocess.run(command, check=True, cwd=elsewhere, env=env)
    dry = [sys.executable, "-m", "radio.cli", "train", "experiment=pocket", "--dry-run"]
    subprocess.run(dry, check=True, cwd=elsewhere, env=env)
