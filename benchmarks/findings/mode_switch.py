"""RADIOv2.5's finding 2: teachers split by resolution against all teachers at all resolutions."""

from __future__ import annotations

from benchmarks.findings.declare import HIGH, HIGHER, LOW, TEACHERS, Arm, Finding, against, stages
from benchmarks.findings.measures import Samples, Scores
from benchmarks.findings.trained import Trained
from radio.evaluation import mode_switch
from radio.evaluation.result import Options

ALL, SPLIT = "all at all", "split"
SEEN_AT = {LOW: TEACHERS[:2], HIGH: TEACHERS[2:]}  # by the split run


def measure(trained: Trained) -> Scores:
    """Measure e = 1 - 1/fidelity of every teacher at every patch step, and its evenness."""
    result = mode_switch.mode_switch(
        trained.target, trained.material.pictures, Options(sizes=(LOW, HIGH))
    )
    curve, scores = result.details["curve"], Scores()
    for row, name in enumerate(curve["y"]):
        values = result.samples[:, row]
        scores[f"evenness/{name}"] = Samples(values, "evenness")
        for at, size in enumerate(curve["x"]):
            scores[f"e/{name}@{size}"] = Samples(values[:, at], "explained")
    return scores


FINDING = Finding(
    title="Mode switch: teachers split by resolution, or all at all",
    claim="Zero-shot of RADIOv2.1, whose teachers were split, is 82.88 at 512 px and 1.29 at 768; "
    "of RADIOv2.5-H, all at all, 79.16, 81.94, 82.09, 82.30 at 224, 432, 768, 1024 (RADIOv2.5, "
    "finding 2).",
    how="`all at all` learns from every teacher at both resolutions, `split` from CLIP and SigLIP "
    f"at {LOW} px only and from DINOv2 and SAM at {HIGH} px only. e = 1 - 1/fidelity is the share "
    "of a teacher's variance that is explained; evenness is min e / max e over all sizes between, "
    "and says little where e is below 0.1 everywhere. How high e is cannot be compared: the split "
    "run shows 2 pictures a step to DINOv2 and SAM instead of 18.",
    arms=(
        Arm(ALL),
        Arm(SPLIT, (stages({"low": (LOW, 16, SEEN_AT[LOW]), "high": (HIGH, 2, SEEN_AT[HIGH])}),)),
    ),
    measure=measure,
    comparisons=(
        *against(ALL, SPLIT, [f"evenness/{name}" for name in TEACHERS], HIGHER),
        *against(ALL, SPLIT, [f"e/{name}@{HIGH}" for name in TEACHERS], None),
        *against(ALL, SPLIT, [f"e/{name}@{LOW}" for name in TEACHERS], None),
    ),
    tables={"Evenness, 1 is the same everywhere": ("evenness/*",), "e": ("e/*",)},
    label="e = 1 - 1/fidelity",
    lines=("e/*",),
    across="px a side",
)
