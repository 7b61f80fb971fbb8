"""RADIOv2.5's finding 6: how many partitions share the teachers of one step."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.findings.declare import HIGHER, LOW, LOWER, TEACHERS, Arm, Finding, against, stages
from benchmarks.findings.measures import Scores, fidelity, neighbours
from benchmarks.findings.trained import Trained
from radio.training.cost import stage_cost

ONE, TWO, FOUR = "1 partition", "2 partitions", "4 partitions"
BATCH = 16  # student pictures of a step in every arm
COST = "teacher GFLOP a picture"
QUALITY = ("knn", *(f"fidelity/{name}@{LOW}" for name in TEACHERS))


def measure(trained: Trained) -> Scores:
    """Measure the teachers' GFLOP for a student picture, fidelity at the trained size, and kNN."""
    cost = stage_cost(trained.config, trained.config.stages[0])
    gflop = sum(cost.teachers.values()) * 1e3 / BATCH
    return {**fidelity(trained, (LOW,)), **neighbours(trained), COST: gflop}


def split(name: str, groups: Sequence[Sequence[str]]) -> Arm:
    """Return an arm whose pictures are shared out evenly over groups of teachers."""
    batch = BATCH // len(groups)
    return Arm(name, (stages({"_".join(group): (LOW, batch, group) for group in groups}),))


FINDING = Finding(
    title="Fewer partitions are better where they can be afforded",
    claim="Fewer partitions are better if affordable, more of them save teacher cost; no numbers "
    "are known to us (RADIOv2.5, finding 6).",
    how=f"A step has {BATCH} pictures of {LOW} px in every arm: all seen by all four teachers, "
    "half by two and half by the other two, or a quarter by each.",
    arms=(
        split(ONE, [TEACHERS]),
        split(TWO, [TEACHERS[:2], TEACHERS[2:]]),
        split(FOUR, [[name] for name in TEACHERS]),
    ),
    measure=measure,
    comparisons=(
        *against(ONE, TWO, QUALITY, HIGHER),
        *against(ONE, FOUR, QUALITY, HIGHER),
        *against(TWO, FOUR, QUALITY, HIGHER),
        *against(FOUR, ONE, (COST,), LOWER),
    ),
    tables={"Cost and quality": (COST, *QUALITY)},
    label="score",
    points=QUALITY,
)
