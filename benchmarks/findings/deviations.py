"""The same standardizers with teachers whose scales lie 191-fold apart, as the real ones' do."""

from __future__ import annotations

from benchmarks.findings import standardizers
from benchmarks.findings.declare import Finding

# PHI-S (2410.01680) tables 7 and 8: DFN CLIP, SigLIP, DINOv2, SAM.
REAL = {"clip": 0.0286, "siglip": 1.8389, "dinov2": 1.3496, "sam": 5.4688}

FINDING = Finding(
    title="Standardizers, at the real teachers' scales",
    claim=f"Deviations of the real teachers: {', '.join(f'{k} {v}' for k, v in REAL.items())}. "
    + standardizers.CLAIM,
    how="The features of each pocket teacher are multiplied by the number that gives them the real "
    "one's deviation; MSE is in the units they had. " + standardizers.HOW,
    arms=standardizers.arms(REAL),
    measure=standardizers.measure,
    comparisons=standardizers.comparisons(),
    tables=standardizers.TABLES,
    figure=standardizers.FIGURE,
    ranked=("knn", "fidelity/*"),
)
