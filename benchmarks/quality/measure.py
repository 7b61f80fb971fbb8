"""Run the jobs that are not stored yet."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.quality.jobs import CONSTANT, CURVE, STUDENT, TEACHER, Job, Setting, Subject
from benchmarks.quality.store import COST, MISSING, read_json, write_json, write_record
from benchmarks.record import circumstances
from radio.errors import RadioError
from radio.evaluation.evaluate import measure
from radio.evaluation.masks import asked_of, ratio
from radio.evaluation.pictures import CLASSES, Pictures
from radio.evaluation.result import Options, Result, bootstrap
from radio.evaluation.shapes import best_box_shape, best_point_shape, iou
from radio.evaluation.target import Target
from radio.evaluation.targets import resolve
from radio.files import sha256_of
from radio.training.checkpoint import find_checkpoint
from teachers.text import TOKENIZER_FILES, TextTower

VERSION = 2  # raise it when the same weights, pictures and settings give other figures
CONSTANT_PRINT = hashlib.sha256(CONSTANT.encode()).hexdigest()


class Measurer:
    """Measures subjects on the sets below `data` and keeps what it finds below `out`."""

    def __init__(self, setting: Setting, data: str, out: Path) -> None:
        self.setting, self.data, self.out = setting, data, out
        self.target = functools.cache(resolve)
        self.pictures = functools.cache(lambda name: Pictures(f"{data}/{name}"))

    def run(self, subjects: Sequence[Subject], chosen: Sequence[str]) -> None:
        """Measure the chosen subjects, or all; what cannot be measured is noted and said."""
        for order, subject in enumerate(subjects):
            if chosen and subject.label not in chosen:
                continue
            missing = self._subject(order, subject)
            for what, why in missing.items():
                print(f"NOT MEASURED {what}: {why}", flush=True)
            noted = read_json(self.out / MISSING).items()
            others = {what: why for what, why in noted if what.split("/")[0] != subject.label}
            write_json(self.out / MISSING, dict(sorted((others | missing).items())))

    def _subject(self, order: int, subject: Subject) -> dict[str, str]:
        """Measure a subject and return what cannot be measured of it, and why."""
        try:
            target = None if subject.label == CONSTANT else self.target(subject.target)
        except RadioError as error:
            return {subject.label: str(error)}
        told = {"target": subject.target}
        facts = {"subject": subject.label, "role": subject.role, "order": order, **told}
        if subject.role == CURVE:
            facts["views_seen"] = find_checkpoint(Path(subject.target)).views_seen
        if target is not None and subject.role in (TEACHER, STUDENT):
            self._cost(self.out / subject.label, target, told)
        missing = {}
        for job in self.setting.jobs(subject):
            try:
                self._job(self.out / subject.label, target, job, facts)
            except RadioError as error:
                missing[f"{subject.label}/{job.name}"] = str(error)
        return missing

    def _job(self, folder: Path, target: Target | None, job: Job, facts: dict[str, Any]) -> None:
        pictures, options = self.pictures(job.row.data), Options(**job.all_options)
        print_ = CONSTANT_PRINT if target is None else target.fingerprint
        against = None if options.against is None else self.target(options.against).fingerprint
        decoder = None if target is None else decoder_print(target, job)
        shown = [pictures.fingerprint, _bytes_of(pictures.folder / CLASSES)]
        told = [VERSION, job.row.task, print_, *shown, against, decoder]
        # What is not given does not count: a new option makes no result another one.
        given = {k: v for k, v in dataclasses.asdict(options).items() if v is not None}
        key = _hashed([*told, given])
        if read_json(folder / f"{job.name}.json").get("key") == key:
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

    def _cost(self, folder: Path, target: Target, told: dict[str, str]) -> None:
        sizes = self.setting.dense_sizes if target.takes_any_size else (target.native_size,)
        key = _hashed([VERSION, COST, target.fingerprint, sizes])
        if read_json(folder / f"{COST}.json").get("key") != key:
            print_ = {"key": key, "fingerprint": target.fingerprint}
            facts = {**print_, **told, **cost_of(target, sizes), **circumstances()}
            write_json(folder / f"{COST}.json", facts)


def decoder_print(target: Target, job: Job) -> str | None:
    """Return a SHA-256 over the text tower or mask decoder of a job, which no target's covers.

    Of a text tower its tokenizer's files count too, where it has such.

    Raises:
        RadioError: there is none.
    """
    adaptor = job.tag or None
    if job.row.of not in ("text", "masks"):
        return None
    decoder: torch.nn.Module
    if job.row.of == "masks":
        decoder = target.mask_decoder(adaptor)
    else:
        decoder = target.text_tower(adaptor, job.all_options.get("tokenizer"))
    digest = hashlib.sha256()
    for name, weight in decoder.state_dict().items():
        digest.update(name.encode() + weight.numpy().tobytes())
    if isinstance(decoder, TextTower):
        digest.update(words_print(decoder).encode())
    return digest.hexdigest()


def words_print(tower: TextTower) -> str:
    """Return a SHA-256 of each of the files of a tower's tokenizer; nothing where it has none."""
    import open_clip  # slow, and not every job reads words

    if not isinstance(tower.tokenize, open_clip.tokenizer.HFTokenizer):
        return ""  # open_clip's own, which comes with its version
    folder = Path(tower.tokenize.tokenizer.name_or_path)
    return " ".join(str(_bytes_of(folder / file)) for file in TOKENIZER_FILES)


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
    modules = [value for value in vars(target).values() if isinstance(value, torch.nn.Module)]
    weights = sum(weight.numel() for module in modules for weight in module.parameters())
    cost: dict[str, Any] = {
        "parameters_m": weights / 1e6,
        "gflop": {str(size): _gflop(target, size, own) for size in sizes},
    }
    if adaptors:
        whole = {str(size): _gflop(target, size, [*own, *adaptors]) for size in sizes}
        cost["gflop_with_adaptors"] = whole
    return cost


def _gflop(target: Target, size: int, names: Sequence[str]) -> float:
    # Fused attention is not among what the counter knows on the CPU.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        target.extract(torch.zeros(1, 3, size, size, dtype=torch.uint8), names)
    return float(counter.get_total_flops()) / 1e9


def _bytes_of(path: Path) -> str | None:
    """Return the SHA-256 of a file; None where there is none."""
    return sha256_of(path) if path.is_file() else None


def _hashed(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()
