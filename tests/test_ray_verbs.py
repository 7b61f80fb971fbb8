"""`radio encode --ray` and `radio evaluate --ray`: what the verbs say here, said by a cluster."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from data_folder import write_folder
from picture_zoo import cut_in_half, jpeg, png
from small_encoder import write_small
from typer.testing import CliRunner

from radio.cli import app
from radio.config import ClusterConfig
from radio.encoder.encoder import load
from radio.extraction.encode import encode
from radio.files import sha256_of
from ray_jobs.cluster import cluster
from ray_jobs.encode import ray_encoded

CONFIG = ClusterConfig(cpus=8, object_store_mb=128)


@pytest.fixture(scope="module")
def running() -> Iterator[None]:
    with cluster(CONFIG):
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of pictures of two sizes, one of them damaged, beside a small encoder."""
    root = tmp_path_factory.mktemp("verbs")
    (root / "photos").mkdir()
    for number in range(40):
        data = jpeg(number) if number % 3 else png(number, 90, 40)
        (root / "photos" / f"p{number:02d}.jpg").write_bytes(data)
    (root / "photos" / "p07.jpg").write_bytes(cut_in_half(jpeg(2, 300, 200)))
    write_small(root / "encoder")
    return root


def files_of(out: Path) -> dict[str, str]:
    """Return each file's hash but for the moment of writing, which done.json has."""
    return {
        str(path.relative_to(out)): sha256_of(path)
        for path in sorted(out.rglob("*"))
        if path.is_file() and not path.name.endswith("done.json")
    }


def local(folder: Path) -> dict[str, str]:
    out = folder / "local"
    torch.set_num_threads(1)  # as the workers
    if not out.exists():
        encode(folder / "photos", out, load(folder / "encoder"), batch=2, shard_rows=15)
    return files_of(out)


def test_encoding_on_ray_writes_the_same_files(running: None, folder: Path) -> None:
    encoder = load(folder / "encoder")
    with ray_encoded(str(folder / "encoder"), CONFIG, workers=2, threads=1) as rows:
        found = encode(
            folder / "photos", folder / "ray", encoder, batch=2, shard_rows=15, encode_rows=rows
        )
    assert (found.ok, found.failed) == (39, 1)
    assert files_of(folder / "ray") == local(folder)


def test_a_killed_encoder_costs_no_picture(running: None, folder: Path, monkeypatch: Any) -> None:
    from ray_jobs import encode as module

    class Dying(module.Pool):
        asked = 0

        def ask(self, *given: Any) -> Any:
            self.asked += 1
            if self.asked == 3:
                pid = ray.get(self.replicas[0].handle.pid.remote())
                os.kill(pid, signal.SIGKILL)
            return super().ask(*given)

    monkeypatch.setattr(module, "Pool", Dying)
    encoder = load(folder / "encoder")
    with ray_encoded(str(folder / "encoder"), CONFIG, workers=2, threads=1) as rows:
        encode(folder / "photos", folder / "dying", encoder, batch=2, shard_rows=15,
               encode_rows=rows)  # fmt: skip
    assert files_of(folder / "dying") == local(folder)


def test_evaluating_on_ray_says_the_same(running: None, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("RADIO_CACHE", str(tmp_path / "cache"))
    data = write_folder(tmp_path / "data")
    words = ["evaluate", "pixels", "--task", "knn,rank", "--data", str(data), "--json", "-"]
    here = CliRunner().invoke(app, words)
    there = CliRunner().invoke(app, [*words, "--ray", "local"])
    assert there.exit_code == 0, there.output
    assert json.loads(there.stdout) == json.loads(here.stdout)


def test_a_mistake_on_ray_arrives_as_itself(running: None, tmp_path: Path) -> None:
    from radio.errors import RadioError
    from radio.evaluation.result import Options
    from ray_jobs.evaluate import measure_on_ray

    with pytest.raises(RadioError, match="nowhere"):
        list(measure_on_ray("pixels", ["knn"], str(tmp_path / "nowhere"), Options(), None, CONFIG))
