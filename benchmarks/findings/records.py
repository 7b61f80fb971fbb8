"""One JSON file per finding, arm and seed: what was measured, and of what."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.findings.declare import Arm, Finding
from benchmarks.findings.measures import Samples, Scores
from benchmarks.findings.trained import Trained, Workshop, identity, trained
from benchmarks.record import circumstances
from radio.errors import RadioError
from radio.files import write_whole

VERSION = 2  # raise it when the same runs would be measured otherwise, or a default changes


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


def take(name: str, finding: Finding, workshop: Workshop, seed: int, arm: Arm, out: Path) -> bool:
    """Train and measure one arm and write its file; False when that is there already."""
    wanted = f"{VERSION}/{identity(workshop.config(arm, seed), arm)}"
    path = path_of(out, name, arm.name, seed)
    if path.exists() and json.loads(path.read_text())["identity"] == wanted:
        return False
    run = trained(workshop, arm, seed)
    started = time.perf_counter()
    scores = finding.measure(run)
    stage, teachers = run.config.stages[0], run.checkpoint.state["teachers"]
    said = {
        "finding": name,
        "arm": arm.name,
        "seed": seed,
        "identity": wanted,
        **circumstances(),
        "overrides": list(arm.overrides),
        "deviations": arm.deviations and dict(arm.deviations),
        "family": {name: facts["fingerprint"] for name, facts in teachers.items()},
        "steps": stage.steps,
        "images": stage.steps * sum(part.batch for part in stage.partitions.values()),
        "seconds": {"train": training_seconds(run), "measure": time.perf_counter() - started},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, as_text(said, scores))
    return True


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


def as_text(said: Mapping[str, Any], scores: Scores) -> str:
    """Return a file's text: facts and scores to read, samples in a line each."""
    samples = {name: found for name, found in scores.items() if isinstance(found, Samples)}
    plain = scores | {name: found.score() for name, found in samples.items()}
    head = json.dumps({**said, "scores": plain}, indent=1)
    lines = [
        f"  {json.dumps(name)}: {json.dumps(found.as_dict(), separators=(',', ':'))}"
        for name, found in samples.items()
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
            records.append(Record(said["arm"], said["seed"], said.pop("scores"), samples, said))
    _refuse_mixed(out / name, records)
    return sorted(records, key=lambda record: (names.index(record.arm), record.seed))


def _refuse_mixed(folder: Path, records: list[Record]) -> None:
    """Refuse records of other steps or teachers; seeded ones differ by seed, scaled by scale."""
    known: dict[str, Any] = {}
    for record in records:
        facts = {"steps": record.said["steps"]}
        scaled = "scaled " if record.said["deviations"] else ""
        for name, fingerprint in record.said["family"].items():
            facts[f"family ({scaled}{name} of seed {record.seed})"] = fingerprint[:12]
        for what, value in facts.items():
            if known.setdefault(what, value) != value:
                raise RadioError(
                    f"{folder} holds records of other {what}: {known[what]} and {value}; delete "
                    "the older ones and measure anew"
                )
