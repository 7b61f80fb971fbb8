"""RADIOv2.5's finding 1: tiles of a fixed size against high resolution seen whole."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from benchmarks.findings.declare import HIGH, HIGHER, LOW, STUDENT, Finding, within
from benchmarks.findings.measures import Samples, Scores
from benchmarks.findings.trained import Trained
from radio.evaluation.equivariance import Tiled, errors
from radio.evaluation.features import features_of
from radio.evaluation.target import Target
from radio.targets.grid import to_grid

Maps = Float[Tensor, "n d _ _"]


def measure(trained: Trained) -> Scores:
    """Measure 1 - cos(f(small picture), small f(picture)), centred, by whole pictures and by tiles.

    The fixed-size teacher is the one that RADIOv2.5 tiles, SigLIP.
    """
    assert HIGH == 2 * LOW, "four tiles make the larger picture"
    siglip = trained.teachers["siglip"]
    return {
        **tiled_errors(trained.target, trained, LOW, STUDENT),
        **tiled_errors(siglip, trained, siglip.native_size, "siglip"),
    }


def tiled_errors(target: Target, trained: Trained, tile: int, who: str) -> Scores:
    """Return per picture what scaling by a half changes, seen whole and in four tiles of a side."""
    split = trained.material.pictures.split("val")
    small = features_of(target, split, "features", tile)
    tiled = features_of(Tiled(target, tile), split, "features", 2 * tile)
    found: Scores = {f"{who} tiled": _scale(tiled, small)}
    if target.takes_any_size:
        whole = features_of(target, split, "features", 2 * tile)
        found[f"{who} whole"] = _scale(whole, small)
        found[f"{who} tiled or whole"] = Samples(errors(whole, tiled, lambda a, b: (a, b))[1])
    return found


def _scale(large: Maps, small: Maps) -> Samples:
    grid = (small.shape[-2], small.shape[-1])
    return Samples(errors(large, small, lambda a, b: (to_grid(a, grid), b))[1])


FINDING = Finding(
    title="Tiling loses context and scale equivariance",
    claim="Scale-equivariance error: AM-RADIO .357, RADIOv2.5-H .119, DINOv2 .126, tiled SigLIP "
    ".623; a student must see high resolution natively (RADIOv2.5, finding 1).",
    how=f"Error of scaling {HIGH} px to {LOW} px, 1 - cos after each side's mean is taken off: "
    "by the student from the whole picture and from its four quarters, and by the SigLIP teacher, "
    "which takes one size, from four tiles of that size.",
    measure=measure,
    comparisons=(
        within("student tiled", "student whole", HIGHER),
        within("siglip tiled", "student whole", HIGHER),
    ),
    tables={"Error, 0 is equivariant": ("student *", "siglip *")},
    label="1 - cos, centred",
    points=("student *", "siglip *"),
)
