"""Codecs: bytes, speed over memcpy, error beside the student's own, and what becomes of a run.

    python -m benchmarks.codec [--data sets] [--seeds 3] [--jobs 2] [--work runs/codec] [--resume]

The first part takes a step of the quick pocket run's own standardized targets. The second trains
`experiment=pocket_quick` with every codec and the same seeds: held-out fidelity, whose targets
always travel as float32. `--jobs` of these runs go at a time, a thread each; none is timed.
`--resume` goes on with the runs of a benchmark that was cut off, instead of beginning anew.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.findings.material import put_together
from benchmarks.record import write
from benchmarks.runs import quick, train
from radio.config import load
from radio.data.configured import training_plan
from radio.targets import codec
from radio.targets.fit import fit
from radio.targets.stream import LocalStream
from radio.targets.target_maker import Request

CODECS = ("float32", "bf16", "int8")
TIMES = 15
LARGE = 16 << 20  # values of the arrays that are timed: more than a cache holds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--data", type=Path, default=Path("sets"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--work", type=Path, default=Path("runs/codec"))
    parser.add_argument("--resume", action="store_true")
    options = parser.parse_args()
    if not options.resume:
        for seed, name in product(range(options.seeds), CODECS):
            shutil.rmtree(options.work / f"{name}-{seed}", ignore_errors=True)
    material = put_together(options.data, options.work / "material")
    shared = quick(material.pictures.folder.resolve(), "stream=local")
    each = list(product(range(options.seeds), CODECS))
    with ThreadPoolExecutor(options.jobs) as jobs:
        said = jobs.map(lambda run: fidelity_of(options.work, shared, *run), each)
        by_run = dict(zip(each, said, strict=True))
    runs = {name: [by_run[seed, name] for seed in range(options.seeds)] for name in CODECS}
    residual = residuals(runs["float32"])
    write(
        "codec",
        {
            "what": "codecs of standardized targets, and the quick pocket run's fidelity by each",
            "speed": speeds(),
            "targets": errors(shared, options.work, residual),
            "fidelity": compared(runs),
        },
    )


def fidelity_of(work: Path, shared: list[str], seed: int, name: str) -> dict[str, float]:
    """Train with a codec and a seed; return held-out fidelity by teacher@resolution."""
    return train(work / f"{name}-{seed}", *shared, f"codec={name}", f"seed={seed}").fidelity


def residuals(runs: list[dict[str, float]]) -> dict[str, float]:
    """Return the share of each teacher's variance that the student leaves: 1 / fidelity."""
    names = {key.split("@")[0] for key in runs[0]}
    return {
        name: statistics.mean(
            1 / value for run in runs for key, value in run.items() if key.startswith(f"{name}@")
        )
        for name in sorted(names)
    }


def speeds() -> dict[str, dict[str, float]]:
    """Return bytes a value, and one thread's GB/s of float32 values over a memcpy of them."""
    torch.set_num_threads(1)  # as memcpy has one, and a teacher by these runs' configuration
    values = torch.randn(LARGE)
    array = values.numpy()
    here = np.empty_like(array)
    copied = seconds(lambda: np.copyto(here, array))
    found = {}
    for name in CODECS:
        coded = codec.encode(values, name)
        encoded = seconds(lambda name=name: codec.encode(values, name))
        decoded = seconds(lambda coded=coded, name=name: codec.decode(coded, name))
        found[name] = {
            "bytes_a_value": coded.nbytes / LARGE,
            "encode_gb_s": array.nbytes / 1e9 / encoded,
            "decode_gb_s": array.nbytes / 1e9 / decoded,
            "encode_over_memcpy": copied / encoded,
            "decode_over_memcpy": copied / decoded,
        }
    return found | {"memcpy": {"gb_s": array.nbytes / 1e9 / copied}}


def seconds(work: Callable[[], Any]) -> float:
    """Return the median seconds of a call."""
    taken = []
    for _ in range(TIMES):
        started = time.perf_counter()
        work()
        taken.append(time.perf_counter() - started)
    return statistics.median(taken)


def errors(
    shared: list[str], work: Path, residual: dict[str, float]
) -> dict[str, dict[str, dict[str, float]]]:
    """Return each teacher's mean squared error by codec, alone and over the student's residual."""
    config = load([*shared, f"out={work / 'errors'}"])
    with LocalStream(config) as stream:
        plan = training_plan(config, len(stream.sources["train"]))
        request = Request("train", "float32", fit(config, stream))
        [(_, coded)] = stream.encode([plan(0)], request)
    found: dict[str, dict[str, dict[str, float]]] = {}
    for name in config.teachers:
        features = [torch.tensor(part[name].features) for part in coded if name in part]
        variance = torch.cat([each.flatten() for each in features]).square().mean().item()
        found[name] = {"student": {"share_of_variance": residual[name]}}
        for kind in CODECS:
            share = statistics.mean(error(each, kind) for each in features) / variance
            num_bytes = sum(codec.encode(each, kind).nbytes for each in features)
            found[name][kind] = {
                "share_of_variance": share,
                "of_the_student_s": share / residual[name],
                "mb_a_step": num_bytes / 1e6,
            }
    return found


def error(values: Tensor, kind: str) -> float:
    """Return the mean squared error of a codec."""
    return (codec.decode(codec.encode(values, kind), kind) - values).square().mean().item()


def compared(runs: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    """Return fidelity by codec and metric, and each codec's paired difference from float32."""
    found: dict[str, Any] = {}
    for metric in runs["float32"][0]:
        found[metric] = {}
        for name, seeds in runs.items():
            values = [run[metric] for run in seeds]
            pairs = zip(values, (run[metric] for run in runs["float32"]), strict=True)
            found[metric][name] = {
                "fidelity": statistics.mean(values),
                "over_float32": [ours / theirs for ours, theirs in pairs],
            }
    return found


if __name__ == "__main__":
    main()
