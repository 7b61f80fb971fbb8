"""RADIOv2.5's finding 5: what is lost without each teacher."""

from __future__ import annotations

from benchmarks.findings.declare import HIGH, HIGHER, LOW, TEACHERS, Arm, Finding, against, stages
from benchmarks.findings.measures import Scores, fidelity, neighbours, streets
from benchmarks.findings.trained import Trained

ALL = "all"
LEFT = {out: [name for name in TEACHERS if name != out] for out in TEACHERS}


def measure(trained: Trained) -> Scores:
    """Measure the backbone downstream, and what is left of the other teachers."""
    return {**neighbours(trained), **streets(trained), **fidelity(trained)}


def without(out: str) -> Arm:
    """Return the arm that lacks one teacher."""
    partitions = {"low": (LOW, 16, LEFT[out]), "high": (HIGH, 2, LEFT[out])}
    return Arm(f"without {out}", (f"~teachers.{out}", stages(partitions)))


FINDING = Finding(
    title="Every teacher helps, SAM included",
    claim="All teachers help, SAM included, though it is the weakest alone (kNN 22.12, ADE20k "
    "28.08); no numbers of leaving one out are known to us (RADIOv2.5, finding 5).",
    how="One teacher is left out, steps and pictures stay. kNN is top 1 of 100 classes by the "
    "backbone's summary, mIoU that of a linear probe of its features on CamVid. What becomes of "
    "the teachers that stay is compared too, without a claim.",
    arms=(Arm(ALL), *(without(out) for out in TEACHERS)),
    measure=measure,
    comparisons=tuple(
        each
        for out, left in LEFT.items()
        for each in (
            *against(ALL, f"without {out}", ("knn", "miou"), HIGHER),
            *against(ALL, f"without {out}", [f"fidelity/{name}@{LOW}" for name in left], None),
        )
    ),
    tables={"Downstream": ("knn", "miou"), "Fidelity": ("fidelity/*",)},
    label="score",
    points=("knn", "miou"),
)
