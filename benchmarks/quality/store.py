"""Results on disk: `<out>/<subject>/<job>.json`, and the values per picture in `.npz` beside it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from radio.errors import RadioError
from radio.evaluation.result import Interval, Result
from radio.files import whole, write_whole

COST, MISSING = "cost", "missing.json"


class Record:
    """A stored result: its row, the subject and adaptor (`tag`) measured, and the size in px.

    `facts` are all that the file says.
    """

    def __init__(self, path: Path, facts: dict[str, Any]) -> None:
        self.path, self.facts = path, facts
        self.subject: str = facts["subject"]
        self.row: str = facts["row"]
        self.tag: str = facts["tag"]
        self.size: int | None = facts["size"]
        result = facts["result"]
        self.score: float = result["score"]
        self.interval: Interval | None = result["interval"] and tuple(result["interval"])
        self.details: dict[str, Any] = result["details"]

    @cached_property
    def samples(self) -> NDArray[Any] | None:
        """The values per picture, where the task has such."""
        path = self.path.with_suffix(".npz")
        if not path.exists():
            return None
        with np.load(path) as file:
            found: NDArray[Any] = file["samples"]
        return found


def write_record(folder: Path, name: str, facts: Mapping[str, Any], result: Result) -> None:
    """Write a result's JSON after its samples, so that a JSON file is never without them."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    if result.samples is not None:
        samples = np.asarray(result.samples)
        if np.array_equal(samples.astype(np.int32), samples):  # which takes no room where it is 0
            samples = samples.astype(np.int32)
        with whole(path.with_suffix(".npz")) as temporary, temporary.open("wb") as file:
            np.savez_compressed(file, samples=samples)
    write_json(path, {**facts, "result": result.as_dict()})


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write a JSON file whole, making its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(values, indent=1) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """Return what a JSON file says; nothing where there is none."""
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return found


@dataclass(frozen=True)
class Stored:
    """All that a folder holds."""

    records: list[Record]
    costs: dict[str, dict[str, Any]]
    missing: dict[str, str]

    def of(self, row: str, subject: str | None = None) -> Iterator[Record]:
        """Yield the records of a row, of one subject if one is given."""
        for record in self.records:
            if record.row == row and subject in (None, record.subject):
                yield record

    def one(self, row: str, subject: str, size: int | None = None, tag: str = "") -> Record | None:
        """Return the record of a subject, at any size if none is given; None when there is none."""
        found = (r for r in self.of(row, subject) if r.tag == tag and size in (None, r.size))
        return next(found, None)

    def subjects(self, role: str) -> list[str]:
        """Return the subjects of a role that have records, in the order of their columns."""
        found = {r.subject: r.facts["order"] for r in self.records if r.facts["role"] == role}
        return sorted(found, key=lambda label: (found[label], label))


def read_stored(out: Path) -> Stored:
    """Read every result.

    Raises:
        RadioError: a subject's results are of different weights.
    """
    files = {path: read_json(path) for path in sorted(out.glob("*/*.json"))}
    weights: dict[str, str] = {}
    for path, facts in files.items():
        label = path.parent.name
        if weights.setdefault(label, facts["fingerprint"]) != facts["fingerprint"]:
            raise RadioError(
                f"the results of '{label}' in {out} are of different weights; measure it to the "
                "end, or delete what is old"
            )
    return Stored(
        [Record(path, facts) for path, facts in files.items() if path.stem != COST],
        {path.parent.name: facts for path, facts in files.items() if path.stem == COST},
        read_json(out / MISSING),
    )
