"""Run the jobs that are not stored yet."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.quality.jobs import CONSTANT, Job, Setting, Subject
from benchmarks.quality.store import COST, MISSING, key_of, write_record
from benchmarks.record import circumstances
from radio.config import from_yaml
from radio.errors import RadioError
from radio.evaluation.evaluate import measure
from radio.evaluation.masks import asked_of, ratio
from radio.evaluation.pictures import Pictures
from radio.evaluation.result import Options, Result, bootstrap
from radio.evaluation.shapes import best_box_shape, best_point_shape, iou
from radio.evaluation.target import Target
from radio.evaluation.targets import resolve
from radio.files import write_whole

VERSION = 1  # raise it when the same weights, pictures and settings give other figures
CONSTANT_PRINT = hashlib.sha256(CONSTANT.encode()).hexdigest()


class Measurer:
    """Measures subjects on the sets below `data` and keeps what it finds below `out`."""

    def __init__(self, setting: Setting, data: str, out: Path) -> None:
        self.setting, self.data, self.out = setting, data, out
        self.missing: dict[str, str] = {}
        self._targets: dict[str, Target] = {}
        self._pictures: dict[str, Pictures] = {}

    def run(self, subjects: Sequence[Subject], chosen: Sequence[str]) -> None:
        """Measure the chosen subjects, or all; what cannot be measured is noted and said."""
        for order, subject in enumerate(subjects):
            if chosen and subject.label not in chosen:
                continue
            self.missing = {}
            self._subject(order, subject)
            self._note(subject.label)

    def _subject(self, order: int, subject: Subject) -> None:
        try:
            target = None if subject.label == CONSTANT else self.target(subject.target)
        except RadioError as error:
            self._lacks(subject.label, error)
            return
        facts: dict[str, Any] = {
            "subject": subject.label,
            "role": subject.role,
            "order": order,
        }
        if subject.role == "curve":
            facts["views_seen"] = views_seen(Path(subject.target))
        folder = self.out / subject.label
        if target is not None:
            self._cost(folder, target, subject)
        for job in self.setting.jobs(subject):
            try:
                self._job(folder, target, job, {**facts, "target": subject.target})
            except RadioError as error:
                self._lacks(f"{subject.label}/{job.name}", error)

    def _job(self, folder: Path, target: Target | None, job: Job, facts: dict[str, Any]) -> None:
        pictures, options = self.pictures(job.row.data), Options(**job.all_options)
        print_ = CONSTANT_PRINT if target is None else target.fingerprint
        key = self._key(job, print_, pictures, options)
        if key_of(folder / f"{job.name}.json") == key:
            return
        started = time.monotonic()
        if target is None:
            result = constant_masks(pictures, options)
            command = "in the details of any `radio evaluate TARGET --task masks`"
        else:
            (result,) = measure(target, (job.row.task,), pictures, options)
            command = job.command(facts["target"], self.data)
        seconds = time.monotonic() - started
        stored = {
            **facts,
            "row": job.row.name,
            "tag": job.tag,
            "size": job.size,
            "key": key,
            "fingerprint": print_,
            "command": command,
            "seconds": round(seconds, 1),
            **circumstances(),
        }
        write_record(folder, job.name, stored, result)
        print(f"{facts['subject']} {job.name}: {result.score:.4f} ({seconds:.0f} s)", flush=True)

    def _key(self, job: Job, fingerprint: str, pictures: Pictures, options: Options) -> str:
        against = None if options.against is None else self.target(options.against).fingerprint
        told = [VERSION, job.row.task, fingerprint, pictures.fingerprint, against]
        return _hashed([*told, dataclasses.asdict(options)])

    def _cost(self, folder: Path, target: Target, subject: Subject) -> None:
        sizes = self.setting.dense_sizes if target.takes_any_size else (target.native_size,)
        key = _hashed([VERSION, COST, target.fingerprint, sizes])
        if subject.role not in ("teacher", "student") or key_of(folder / f"{COST}.json") == key:
            return
        facts = {
            "key": key,
            "fingerprint": target.fingerprint,
            "target": subject.target,
            **cost_of(target, sizes),
            **circumstances(),
        }
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / f"{COST}.json", json.dumps(facts, indent=1) + "\n")

    def target(self, name: str) -> Target:
        """Return a target, built once."""
        if name not in self._targets:
            self._targets[name] = resolve(name)
        return self._targets[name]

    def pictures(self, name: str) -> Pictures:
        """Return a set, opened once."""
        if name not in self._pictures:
            self._pictures[name] = Pictures(f"{self.data}/{name}")
        return self._pictures[name]

    def _lacks(self, what: str, error: RadioError) -> None:
        self.missing[what] = str(error)
        print(f"NOT MEASURED {what}: {error}", flush=True)

    def _note(self, label: str) -> None:
        """Replace what is noted as missing of one subject."""
        path = self.out / MISSING
        noted = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        kept = {what: why for what, why in noted.items() if what.split("/")[0] != label}
        self.out.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps({**kept, **self.missing}, indent=1, sort_keys=True) + "\n")


def constant_masks(data: Pictures, options: Options) -> Result:
    """Return the task `masks` answered by the best constant shape chosen on the train split."""
    known, asked = asked_of(data.split("train")), asked_of(data.split("val"))
    best = {"point": best_point_shape, "box": best_box_shape}[options.prompt](known.instances)
    scores = [iou(best.draw(instance), instance.mask) for instance in asked.instances]
    rows = asked.by_picture(np.array(scores))
    details = {"score_is": f"mean IoU over instances, {options.prompt}", "shape": best.name}
    interval = bootstrap(rows, ratio, seed=options.seed)
    return Result("masks", CONSTANT, ratio(rows), interval, details, rows)


def cost_of(target: Target, sizes: Sequence[int]) -> dict[str, Any]:
    """Return millions of parameters, and GFLOP (2 per multiply-add) per image by size in px.

    Of an encoder `gflop` is that of its backbone, `gflop_with_adaptors` that of everything it
    gives. Text towers and mask decoders are not counted.
    """
    own = [name for name in ("summary", "features") if name in target.names]
    adaptors = [name for name in target.names if name.split(":")[0] in target.facts]
    cost: dict[str, Any] = {
        "parameters_m": _parameters(target) / 1e6,
        "gflop": {str(size): _gflop(target, size, own) for size in sizes},
    }
    if adaptors:
        everything = [*own, *adaptors]
        cost["gflop_with_adaptors"] = {
            str(size): _gflop(target, size, everything) for size in sizes
        }
    return cost


def _gflop(target: Target, size: int, names: Sequence[str]) -> float:
    # Fused attention is not among what the counter knows on the CPU.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        target.extract(torch.zeros(1, 3, size, size, dtype=torch.uint8), names)
    return float(counter.get_total_flops()) / 1e9


def _parameters(target: Target) -> int:
    modules = [value for value in vars(target).values() if isinstance(value, torch.nn.Module)]
    return sum(weight.numel() for module in modules for weight in module.parameters())


def views_seen(checkpoint: Path) -> int:
    """Return the views that a student was trained on before a checkpoint was written."""
    config = from_yaml((checkpoint / "config.yaml").read_text(encoding="utf-8"))
    left = yaml.safe_load((checkpoint / "state.yaml").read_text(encoding="utf-8"))["step"]
    views = 0
    for stage in config.stages:
        steps = min(left, stage.steps)
        views += steps * sum(partition.batch for partition in stage.partitions.values())
        left -= steps
    return views


def _hashed(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()
