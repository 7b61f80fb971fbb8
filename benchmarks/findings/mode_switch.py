"""RADIOv2.5's finding 2: teachers split by resolution against all teachers at all resolutions."""

from __future__ import annotations

from benchmarks.findings.declare import (
    HIGH,
    HIGHER,
    LOW,
    TEACHERS,
    Arm,
    Comparison,
    Figure,
    Finding,
    Measured,
    Table,
    against,
    stages,
)
from benchmarks.findings.samples import Samples
from benchmarks.findings.trained import Trained
from radio.evaluation import mode_switch
from radio.evaluation.result import Options

ALL, SPLIT = "all at all", "split"


def measure(trained: Trained) -> Measured:
    """Measure e = 1 - 1/fidelity of every teacher at every patch step, and its evenness."""
    result = mode_switch.mode_switch(
        trained.target, trained.material.pictures, Options(sizes=(LOW, HIGH))
    )
    sizes, names = result.details["curve"]["x"], list(result.details["curve"]["y"])
    samples = {}
    for row, name in enumerate(names):
        values = result.samples[:, row]
        samples[f"evenness/{name}"] = Samples(values, "evenness")
        for at, size in enumerate(sizes):
            samples[f"e/{name}@{size}"] = Samples(values[:, at], "explained")
    return Measured(samples=samples)


def comparisons() -> tuple[Comparison, ...]:
    """Evenness of every teacher, and e where the split run never saw the teacher."""
    unseen = [f"e/{name}@{HIGH if name in ('clip', 'siglip') else LOW}" for name in TEACHERS]
    evenness = [f"evenness/{name}" for name in TEACHERS]
    return against(ALL, SPLIT, [*evenness, *unseen], HIGHER)


FINDING = Finding(
    title="Mode switch: teachers split by resolution, or all at all",
    claim="Zero-shot of RADIOv2.1, whose teachers were split, is 82.88 at 512 px and 1.29 at 768; "
    "of RADIOv2.5-H, all at all, 79.16, 81.94, 82.09, 82.30 at 224, 432, 768, 1024 (RADIOv2.5, "
    "finding 2).",
    how="`all at all` learns from every teacher at both resolutions, `split` from CLIP and SigLIP "
    f"at {LOW} px only and from DINOv2 and SAM at {HIGH} px only. e = 1 - 1/fidelity is the share "
    "of a teacher's variance that is explained; evenness is min e / max e over all sizes between.",
    arms=(
        Arm(ALL),
        Arm(
            SPLIT,
            (
                stages(
                    {
                        "low": (LOW, 16, {"clip": "native", "siglip": "native"}),
                        "high": (HIGH, 2, {"dinov2": "match", "sam": "native"}),
                    }
                ),
            ),
        ),
    ),
    measure=measure,
    comparisons=comparisons(),
    tables=(Table("Evenness, 1 is the same everywhere", ("evenness/*",)), Table("e", ("e/*",))),
    figure=Figure("lines", "e = 1 - 1/fidelity", ("e/*",)),
)
