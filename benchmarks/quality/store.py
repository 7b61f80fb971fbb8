"""Results on disk: `<out>/<subject>/<job>.json`, and the values per picture in `.npz` beside it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from radio.errors import RadioError
from radio.evaluation.result import Result
from radio.files import whole, write_whole

COST, MISSING = "cost", "missing.json"


@dataclass(frozen=True)
class Record:
    """A stored result and where it lies."""

    path: Path
    facts: dict[str, Any]

    @property
    def subject(self) -> str:
        """The column."""
        return str(self.facts["subject"])

    @property
    def row(self) -> str:
        """The row's name."""
        return str(self.facts["row"])

    @property
    def tag(self) -> str:
        """The adaptor that was measured, or nothing."""
        return str(self.facts["tag"])

    @property
    def size(self) -> int | None:
        """The side in px of what went in."""
        size: int | None = self.facts["size"]
        return size

    @property
    def score(self) -> float:
        """The task's score."""
        return float(self.facts["result"]["score"])

    @property
    def interval(self) -> tuple[float, float] | None:
        """Its 95 % interval."""
        found = self.facts["result"]["interval"]
        return None if found is None else (found[0], found[1])

    @property
    def details(self) -> dict[str, Any]:
        """The task's details."""
        details: dict[str, Any] = self.facts["result"]["details"]
        return details

    @cached_property
    def samples(self) -> NDArray[Any] | None:
        """The values per picture, where the task has such."""
        path = self.path.with_suffix(".npz")
        if not path.exists():
            return None
        with np.load(path) as file:
            found: NDArray[Any] = file["samples"]
        return found


def write_record(folder: Path, name: str, facts: dict[str, Any], result: Result) -> None:
    """Write a result's JSON after its samples, so that a JSON file is never without them."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    if result.samples is not None:
        with whole(path.with_suffix(".npz")) as temporary, temporary.open("wb") as file:
            np.savez_compressed(file, samples=_small(np.asarray(result.samples)))
    write_whole(path, json.dumps({**facts, "result": result.as_dict()}, indent=1) + "\n")


def _small(samples: NDArray[Any]) -> NDArray[Any]:
    """Return whole numbers as int32, which take no room when most are 0."""
    as_int = samples.astype(np.int32)
    return as_int if np.array_equal(as_int, samples) else samples


def key_of(path: Path) -> str | None:
    """Return what decides a stored figure; None when there is none."""
    if not path.exists():
        return None
    return str(json.loads(path.read_text(encoding="utf-8")).get("key"))


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
        for record in self.of(row, subject):
            if record.tag == tag and size in (None, record.size):
                return record
        return None

    def subjects(self, role: str) -> list[str]:
        """Return the subjects of a role that have records, in the order of their names."""
        found = {r.subject: r.facts["order"] for r in self.records if r.facts["role"] == role}
        return sorted(found, key=lambda label: (found[label], label))


def read_stored(out: Path) -> Stored:
    """Read every result.

    Raises:
        RadioError: a subject's results are of different weights.
    """
    records, costs = [], {}
    for path in sorted(out.glob("*/*.json")):
        facts = json.loads(path.read_text(encoding="utf-8"))
        if path.stem == COST:
            costs[path.parent.name] = facts
        else:
            records.append(Record(path, facts))
    for subject in {record.subject for record in records}:
        prints = {r.facts["fingerprint"] for r in records if r.subject == subject}
        prints |= {costs[subject]["fingerprint"]} if subject in costs else set()
        if len(prints) > 1:
            raise RadioError(
                f"the results of '{subject}' in {out} are of different weights; measure it to the "
                "end, or delete what is old"
            )
    missing = out / MISSING
    reasons = json.loads(missing.read_text(encoding="utf-8")) if missing.exists() else {}
    return Stored(records, costs, reasons)
