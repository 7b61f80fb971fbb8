"""What a rehearsal found: a row per model, as tables and as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.table import Table

from radio.files import write_whole


@dataclass(frozen=True)
class TargetRow:
    """A teacher's target of one partition as the student gets it, batch first."""

    summary: tuple[int, ...] | None
    features: tuple[int, ...]
    bytes_shipped: int


@dataclass(frozen=True)
class TeacherRow:
    """What a teacher takes; with a reason in `skipped` only what its card says is known.

    `gflops` (2 x MAC) and `forward_seconds` are of one picture at the native size, `step_seconds`
    of all partitions. The standardizer saw `fit_positions` vectors of `channels` each. `peak_bytes`
    is that of the whole process while the teacher was there.
    """

    name: str
    card_parameters_m: float
    card_gflops: float
    channels: int
    skipped: str | None = None
    precision: str = ""
    parameters_m: float = 0.0
    gflops: float = 0.0
    build_seconds: float = 0.0
    forward_seconds: float = 0.0
    fit_seconds: float = 0.0
    fit_positions: int = 0
    step_seconds: float = 0.0
    peak_bytes: int = 0
    targets: Mapping[str, TargetRow] | None = None

    @property
    def bytes_shipped(self) -> int:
        """Bytes of a step's targets over all partitions."""
        return sum(target.bytes_shipped for target in (self.targets or {}).values())


@dataclass(frozen=True)
class StudentRow:
    """What one training step of a student takes, its blocks' activations computed twice."""

    name: str
    parameters_m: float
    backbone_parameters_m: float
    build_seconds: float
    skipped: str | None = None
    step_seconds: float = 0.0
    peak_bytes: int = 0
    losses: Mapping[str, float] | None = None


@dataclass(frozen=True)
class Rehearsal:
    """The result; `views` is (number, height, width); the first student has no name."""

    views: Mapping[str, tuple[int, int, int]]
    threads: int
    seconds: float
    teachers: Sequence[TeacherRow]
    students: Sequence[StudentRow]


def write_rehearsal(path: Path, result: Rehearsal) -> None:
    """Write a rehearsal as JSON, under the names of its fields and the sum of bytes shipped."""
    value = asdict(result)
    for row, written in zip(result.teachers, value["teachers"], strict=True):
        written["bytes_shipped"] = row.bytes_shipped
    write_whole(path, json.dumps(value, indent=2) + "\n")


def rehearsal_tables(result: Rehearsal) -> list[Table]:
    """Return the teachers' table and the students'."""
    views = ", ".join(f"{name} {n} x {h} x {w} px" for name, (n, h, w) in result.views.items())
    title = f"one step on seeded weights ({views}; {result.threads} threads)"
    teacher_columns = (
        "teacher", "weights", "M", "card", "GFLOP", "card", "build s", "picture s", "fit s",
        "fitted on", "step s", "targets", "MB a step", "peak GB",
    )  # fmt: skip
    teachers = _table(title, teacher_columns, left=("teacher", "weights", "targets"))
    for row in result.teachers:
        teachers.add_row(*_cells(row))
    student_columns = (
        "student",
        "M",
        "of these backbone",
        "build s",
        "step s",
        "peak GB",
        "losses",
    )
    below = _table(f"{result.seconds / 60:.1f} minutes in all", student_columns, left=("losses",))
    for student in result.students:
        losses = (f"{name} {value:.3g}" for name, value in (student.losses or {}).items())
        below.add_row(
            student.name or "-",
            f"{student.parameters_m:,.1f}",
            f"{student.backbone_parameters_m:,.1f}",
            f"{student.build_seconds:.1f}",
            f"{student.step_seconds:.1f}",
            f"{student.peak_bytes / 1e9:.1f}",
            f"left out: {student.skipped}" if student.skipped else "\n".join(losses),
        )
    return [teachers, below]


def _table(title: str, columns: Sequence[str], left: Sequence[str]) -> Table:
    table = Table(title=title, box=None)
    for column in columns:
        table.add_column(column, justify="left" if column in left else "right")
    return table


def _cells(row: TeacherRow) -> list[str]:
    card = f"{row.card_parameters_m:,.1f}", f"{row.card_gflops:,.1f}"
    if row.skipped:
        return [row.name, "left out", "", card[0], "", card[1], *[""] * 5, row.skipped, "", ""]
    targets = (
        f"{name} {_shape(target.features)}"
        + ("" if target.summary is None else f" and {_shape(target.summary)}")
        for name, target in (row.targets or {}).items()
    )
    return [
        row.name,
        row.precision,
        f"{row.parameters_m:,.1f}",
        card[0],
        f"{row.gflops:,.1f}",
        card[1],
        f"{row.build_seconds:.1f}",
        f"{row.forward_seconds:.1f}",
        f"{row.fit_seconds:.1f}",
        f"{row.fit_positions:,} x {row.channels:,}",
        f"{row.step_seconds:.1f}",
        "\n".join(targets),
        f"{row.bytes_shipped / 1e6:.1f}",
        f"{row.peak_bytes / 1e9:.1f}",
    ]


def _shape(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape))
