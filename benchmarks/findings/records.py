"""One JSON file per finding, arm and seed: what was measured, and of what."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.findings.declare import Finding, Measured
from benchmarks.findings.samples import Samples
from benchmarks.findings.trained import Trained, Workshop, identity, trained
from benchmarks.record import circumstances
from radio.errors import RadioError
from radio.files import write_whole

VERSION = 1  # raise it when the same runs would be measured otherwise


@dataclass(frozen=True)
class Record:
    """A measured arm: scores and samples by metric, and all that the file says beside."""

    arm: str
    seed: int
    scores: Mapping[str, float]
    samples: Mapping[str, Samples]
    said: Mapping[str, Any]


def path_of(out: Path, finding: str, arm: str, seed: int) -> Path:
    """Return the file of a finding's arm with a seed."""
    return out / finding / f"{arm.replace(' ', '_')}-{seed}.json"


def is_there(path: Path, wanted: str) -> bool:
    """Whether the file holds a measurement of exactly what is wanted."""
    return path.exists() and json.loads(path.read_text())["identity"] == wanted


def take(name: str, finding: Finding, workshop: Workshop, seed: int, arm: int, out: Path) -> bool:
    """Train and measure one arm and write its file; False when that is there already."""
    chosen = finding.arms[arm]
    config = workshop.config(chosen, seed)
    wanted = f"{VERSION}/{identity(config, chosen)}"
    path = path_of(out, name, chosen.name, seed)
    if is_there(path, wanted):
        return False
    run = trained(workshop, chosen, seed)
    started = time.perf_counter()
    measured = finding.measure(run)
    said = {
        "finding": name,
        "arm": chosen.name,
        "seed": seed,
        "identity": wanted,
        **circumstances(),
        **facts_of(run),
        "seconds": {"train": training_seconds(run), "measure": time.perf_counter() - started},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, as_text(said, measured))
    return True


def facts_of(run: Trained) -> dict[str, Any]:
    """Return what was trained: overrides, (scaled) teachers by fingerprint, steps, pictures."""
    stage, teachers = run.config.stages[0], run.checkpoint.state["teachers"]
    return {
        "overrides": list(run.arm.overrides),
        "deviations": run.arm.deviations and dict(run.arm.deviations),
        "family": {name: facts["fingerprint"] for name, facts in teachers.items()},
        "steps": stage.steps,
        "images": stage.steps * sum(part.batch for part in stage.partitions.values()),
    }


def training_seconds(run: Trained) -> float:
    """Return the seconds of a run's steps, whoever trained it, making or finding targets included.

    A line of metrics.jsonl has the mean over the steps since the one before it.
    """
    total, before = 0.0, 0
    for line in (Path(run.config.out) / "metrics.jsonl").read_text().splitlines():
        said = json.loads(line)
        if "seconds" in said:
            total += said["seconds"] * (said["step"] - before)
            before = said["step"]
    return total


def as_text(said: Mapping[str, Any], measured: Measured) -> str:
    """Return a file's text: facts and scores to read, samples in a line each."""
    plain = dict(measured.scores)
    scores = {**plain, **{name: found.score for name, found in measured.samples.items()}}
    head = json.dumps({**said, "scores": scores}, indent=1)
    lines = [
        f"  {json.dumps(name)}: {json.dumps(found.as_dict(), separators=(',', ':'))}"
        for name, found in measured.samples.items()
    ]
    return head[:-2] + ',\n "samples": {\n' + ",\n".join(lines) + "\n }\n}\n"


def read(out: Path, name: str, finding: Finding) -> list[Record]:
    """Return a finding's records, by arm and seed; [] where none is there.

    Raises:
        RadioError: records of one finding that come from other teachers or numbers of steps.
    """
    names = [arm.name for arm in finding.arms]
    records = []
    for path in sorted((out / name).glob("*.json")):
        said = json.loads(path.read_text())
        if said["arm"] in names:
            samples = {key: Samples.of(value) for key, value in said.pop("samples").items()}
            scores = said.pop("scores")
            records.append(Record(said["arm"], said["seed"], scores, samples, said))
    _refuse_mixed(out / name, records)
    return sorted(records, key=lambda record: (names.index(record.arm), record.seed))


def _refuse_mixed(folder: Path, records: list[Record]) -> None:
    for key in ("steps", "family"):
        found = {json.dumps(said) for record in records for said in _each(record, key)}
        if len({entry.split(": ")[0] for entry in found}) < len(found):
            raise RadioError(
                f"{folder} holds records of other {key} ({', '.join(sorted(found))}); delete the "
                "older ones and measure anew"
            )


def _each(record: Record, key: str) -> list[str]:
    """Return `name: value` for what must be alike over records; seeded teachers differ by seed."""
    said = record.said[key]
    if isinstance(said, Mapping):
        return [f"{name} of seed {record.seed}: {value[:12]}" for name, value in said.items()]
    return [f"{key}: {said}"]
