"""RADIOv2.5's finding 3: mosaics for a fixed-size teacher against native and padded views."""

from __future__ import annotations

import statistics

import torch

from benchmarks.findings.declare import HIGH, HIGHER, LOW, LOWER, Arm, Finding, against
from benchmarks.findings.measures import Scores, fidelity, neighbours
from benchmarks.findings.trained import Trained
from radio.data.configured import training_plan
from radio.targets.stream import device_of, open_sources
from radio.targets.target_maker import Request, build_readers, build_target_maker
from radio.training.cost import teacher_gflop

MOSAIC, NATIVE, PADDED = "mosaic", "native", "padded"
SECONDS, GFLOP = "SAM seconds a view", "SAM GFLOP a view"
STEPS = 5  # of which SAM is timed; the first warms up
AT_LOW, AT_HIGH = (f"fidelity/sam@{size}" for size in (LOW, HIGH))


def measure(trained: Trained) -> Scores:
    """Measure what SAM costs for a low view, and what the student knows of it and of the rest."""
    return {**fidelity(trained), **neighbours(trained), **cost(trained)}


def cost(trained: Trained) -> Scores:
    """Measure SAM's GFLOP and median seconds for a view of the low partition, reading included."""
    config = trained.config
    low = config.stages[0].partitions["low"]
    sources = open_sources(config)
    maker = build_target_maker(config, "sam", build_readers(config, sources), device_of(config))
    plan = training_plan(config, len(sources["train"]))
    torch.set_num_threads(config.threads.teacher)
    seconds = []
    for step in range(min(STEPS, plan.num_steps)):
        part = next(part for part in plan(step).partitions if part.name == "low")
        seconds.append(maker(part, Request("train", "float32", {})).seconds / len(part.views))
    gflop = teacher_gflop(config, "sam", low, low.image_size)
    return {GFLOP: gflop, SECONDS: statistics.median(seconds[1:] or seconds)}


FINDING = Finding(
    title="Mosaics make a fixed-size teacher affordable",
    claim="Views of low resolution on one canvas of SAM cost less than a pass each, need no "
    "interpolation of features, and are slightly better since positions vary; no numbers are "
    "known to us (RADIOv2.5, finding 3).",
    how=f"How SAM, whose canvas is 256 px, is shown views of {LOW} px: four on a canvas, one "
    "enlarged to the canvas (native), one alone in its corner (padded). In all arms SAM is shown "
    f"natively at {HIGH} px, where they are compared. At {LOW} px it says other things of a "
    "picture on a full canvas, enlarged or alone, so that each arm has learnt something else; "
    "shown is fidelity to full canvases, which only mosaics taught.",
    arms=(
        Arm(MOSAIC),
        *(Arm(m, (f"stages.0.partitions.low.views.sam={m}",)) for m in (NATIVE, PADDED)),
    ),
    measure=measure,
    comparisons=(
        *against(MOSAIC, NATIVE, (AT_HIGH,), HIGHER),
        *against(MOSAIC, PADDED, (AT_HIGH,), HIGHER),
        *against(MOSAIC, NATIVE, (AT_LOW, "knn"), None),
        *against(MOSAIC, PADDED, (AT_LOW, "knn"), None),
        *against(MOSAIC, NATIVE, (SECONDS, GFLOP), LOWER),
        *against(MOSAIC, PADDED, (SECONDS, GFLOP), LOWER),
    ),
    tables={"Cost of SAM": (SECONDS, GFLOP), "Fidelity and kNN": ("fidelity/*", "knn")},
    label="fidelity",
    points=("fidelity/sam@*",),
)
