"""PHI-S's tables 1 and 3, RADIOv2.5's finding 4: raw MSE, scales, rotations and whitenings.

Twice: with the pocket teachers as they are, and with their features scaled to the real teachers'
deviations, which lie 191-fold apart. All are fitted on every picture: a whitening of 1280 channels
has to see far more positions than a scale.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from benchmarks.findings.declare import (
    HIGH,
    HIGHER,
    LOW,
    LOWER,
    RANK,
    TEACHERS,
    Arm,
    Comparison,
    Finding,
    against,
)
from benchmarks.findings.measures import Scores, fidelity, neighbours, told_at
from benchmarks.findings.trained import Trained

OURS, RAW, WHITENED = "phi_s", "identity", ("pca", "zca", "hadamard")
OURS_SCALED = "phi_s scaled"
FIT_ON_ALL = "fit.steps=100"  # of 18 pictures each: all 1,800
KINDS = (RAW, "global_scale", "per_channel", OURS, *WHITENED)
LOW_FIDELITY = [f"fidelity/{name}@{LOW}" for name in TEACHERS]
# PHI-S (2410.01680) tables 7 and 8: DFN CLIP, SigLIP, DINOv2, SAM.
REAL = {"clip": 0.0286, "siglip": 1.8389, "dinov2": 1.3496, "sam": 5.4688}


def measure(trained: Trained) -> Scores:
    """Measure fidelity, kNN and what the standardizers do to held-out features."""
    return {**fidelity(trained), **neighbours(trained), **deviations(trained)}


def deviations(trained: Trained) -> Scores:
    """Measure deviations of held-out native features before and after standardization."""
    split = trained.material.pictures.split("val")
    scores = Scores()
    for name, teacher in trained.teachers.items():
        maps = told_at(trained, teacher, split, HIGH)
        rows = maps.movedim(1, -1).flatten(0, -2).double() * trained.factors.get(name, 1.0)
        after = trained.checkpoint.standardizers[name].transform(rows)
        spread = after.std(dim=0, correction=0)
        scores[f"before/{name}"] = float(rows.var(dim=0, correction=0).mean().sqrt())
        scores[f"after/{name}"] = float(after.var(dim=0, correction=0).mean().sqrt())
        scores[f"spread/{name}"] = float(spread.max() / spread.clamp_min(1e-12).min())
    return scores


def arm(kind: str, deviations: Mapping[str, float] | None = None, name: str | None = None) -> Arm:
    """Return the arm of a kind of standardizer."""
    chosen = (f"teachers.{teacher}.standardizer={kind}" for teacher in TEACHERS)
    return Arm(name or kind, (*chosen, FIT_ON_ALL), deviations)


PAPER = (
    "ViT-B, zero-shot / kNN / SAM-COCO (table 13): plain MSE 56.17 / 71.54 / 71.90, global scale "
    "70.91 / 79.51 / 69.75, per channel 70.51 / 79.35 / 70.22, PHI-S 70.73 / 79.53 / 69.89, PCA "
    "70.23 / 79.30 / 69.55, ZCA 70.38 / 79.28 / 69.37, Hadamard 70.47 / 79.33 / 69.19. Mean rank "
    "(table 1, the first of three): plain 7.83, global 3.81, per channel 4.21, PHI-S 2.92, PCA "
    "6.29, ZCA 6.46, Hadamard 6.58. Reconstruction MSE (table 3; CLIP 1e-4, SigLIP, DINOv2, SAM): "
    "plain 5.0883 / 1.9598 / 1.0767 / 6.5082, global 4.7420 / 1.9120 / .8801 / 8.4910, per channel "
    "4.7417 / 1.9146 / .8928 / 8.3272, PHI-S 4.7200 / 1.9010 / .8865 / 8.3330, PCA 4.7861 / 1.9534 "
    "/ .9316 / 8.7309, ZCA 4.7841 / 1.9529 / .9321 / 8.7061, Hadamard 4.7855 / 1.9545 / .9326 / "
    "8.7226 (PHI-S, 2410.01680)."
)
# Teachers of which another kind reconstructs better than PHI-S in table 3.
BETTER = {RAW: ("sam",), "global_scale": ("dinov2",), "per_channel": ("sam",)}


def against_ours(kind: str) -> tuple[Comparison, ...]:
    """Set PHI-S against another kind, as tables 13, 1 and 3 have the two."""
    losing = BETTER.get(kind, ())
    reconstruction = (
        each
        for name, metric in zip(TEACHERS, LOW_FIDELITY, strict=True)
        for each in against(OURS, kind, (metric,), LOWER if name in losing else HIGHER)
    )
    return (
        *against(OURS, kind, (RANK,), LOWER),
        *against(OURS, kind, ("knn",), HIGHER),
        *reconstruction,
    )


FINDING = Finding(
    title="Standardizers, at the pocket teachers' own scales",
    claim=PAPER,
    how="Arms differ in the standardizer of all four teachers alone, fitted on every training "
    "picture. Fidelity and MSE are those of held-out features in the teachers' own spaces. The "
    "mean rank is over kNN and all fidelities, 1 the best. `before` is a teacher's deviation, sqrt "
    "of its mean variance, on held-out pictures; `after` that of what the student is asked for, "
    "and `spread` the largest of its channels' deviations over the smallest.",
    arms=tuple(arm(kind) for kind in KINDS),
    measure=measure,
    comparisons=tuple(each for kind in KINDS if kind != OURS for each in against_ours(kind)),
    tables={
        "kNN and fidelity": (RANK, "knn", "fidelity/*"),
        "Reconstruction MSE (as table 3)": (f"mse/*@{LOW}",),
        "Deviations before and after": ("before/*", "after/*", "spread/*"),
    },
    label="fidelity",
    points=(f"fidelity/*@{LOW}",),
    ranked=("knn", "fidelity/*"),
)
SCALED = replace(
    FINDING,
    title="Standardizers, at the real teachers' scales",
    claim="Features of the real teachers deviate by "
    f"{', '.join(f'{deviation} ({name})' for name, deviation in REAL.items())} (tables 7 and 8), "
    "which plain MSE weighs by their squares. Scores are those of the finding above.",
    how="As above, but the features of each pocket teacher are multiplied by the number that gives "
    "them the real one's deviation; MSE is in the units they had. All standardizers but identity "
    f"take the scale away, so their runs are those of the finding above; `{OURS_SCALED}` is "
    "trained to see that, and has no rank.",
    arms=(
        arm(RAW, REAL),
        *(arm(kind) for kind in KINDS if kind != RAW),
        arm(OURS, REAL, OURS_SCALED),
    ),
    comparisons=(
        *FINDING.comparisons,
        *against(OURS_SCALED, OURS, ("knn", *LOW_FIDELITY), None),
    ),
    tables={
        **FINDING.tables,
        "Deviations before and after": ("after/*", "spread/*"),
    },
    unranked=(OURS_SCALED,),
)
