"""RADIOv2.5's finding 5: what is lost without each teacher."""

from __future__ import annotations

from benchmarks.findings.declare import (
    HIGH,
    HIGHER,
    LOW,
    MODES,
    TEACHERS,
    Arm,
    Comparison,
    Figure,
    Finding,
    Measured,
    Table,
    against,
    of_teachers,
    stages,
)
from benchmarks.findings.measures import fidelity, neighbours, streets, together
from benchmarks.findings.trained import Trained

ALL = "all"


def measure(trained: Trained) -> Measured:
    """Measure the backbone downstream, and what is left of the other teachers."""
    return together([neighbours(trained), streets(trained), fidelity(trained)])


def without(name: str) -> Arm:
    """Return the arm that lacks one teacher."""
    views = {teacher: mode for teacher, mode in MODES.items() if teacher != name}
    low = views | ({"sam": "mosaic"} if name != "sam" else {})
    partitions = {"low": (LOW, 16, low), "high": (HIGH, 2, views)}
    return Arm(f"without {name}", (f"~teachers.{name}", stages(partitions)))


def comparisons() -> tuple[Comparison, ...]:
    """All against each four of five, downstream and (with no claim) on the teachers that stay."""
    found: list[Comparison] = []
    for name in TEACHERS:
        left = f"without {name}"
        stay = [other for other in TEACHERS if other != name]
        found += against(ALL, left, ("knn", "miou"), HIGHER)
        found += against(ALL, left, of_teachers("fidelity", stay, (LOW,)), None)
    return tuple(found)


FINDING = Finding(
    title="Every teacher helps, SAM included",
    claim="All teachers help, SAM included, though it is the weakest alone (kNN 22.12, ADE20k "
    "28.08); no numbers of leaving one out are known to us (RADIOv2.5, finding 5).",
    how="One teacher is left out, steps and pictures stay. kNN is top 1 of 100 classes by the "
    "backbone's summary, mIoU that of a linear probe of its features on CamVid.",
    arms=(Arm(ALL), *(without(name) for name in TEACHERS)),
    measure=measure,
    comparisons=comparisons(),
    tables=(Table("Downstream", ("knn", "miou")), Table("Fidelity", ("fidelity/*",))),
    figure=Figure("bars", "score", ("knn", "miou")),
)
