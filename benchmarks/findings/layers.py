"""RADIOv2.5's finding 8: intermediate layers under a linear and under an MLP probe."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from benchmarks.findings.declare import (
    HIGH,
    HIGHER,
    Arm,
    Comparison,
    Figure,
    Finding,
    Measured,
    Side,
    Table,
)
from benchmarks.findings.measures import batches_of
from benchmarks.findings.samples import Samples
from benchmarks.findings.trained import Trained
from radio.encoder.layers import layer_name
from radio.evaluation.label_maps import IGNORED, LabelMaps, Map, label_maps
from radio.evaluation.pictures import Split
from radio.evaluation.result import Options
from radio.evaluation.segmentation import confusion

STUDENT = "student"
LAYERS = (2, 5, 8, 11)
HIDDEN = {"linear": 0, "mlp": 256}
STEPS, CELLS, RATE = 400, 2048, 2e-3  # AdamW on random cells, the rate falling to 0
Maps = Float[Tensor, "n d h w"]


def measure(trained: Trained) -> Measured:
    """Measure mIoU of both probes on the features of single layers and of all together."""
    data, seed = trained.material.streets, trained.config.seed
    labels = label_maps(data, Options())
    train, val = (layers_of(trained, data.split(split)) for split in ("train", "val"))
    choices = {f"layer {n}": (n,) for n in LAYERS} | {"mixed": LAYERS}
    samples = {}
    for name, numbers in choices.items():
        shown, asked = (torch.cat([each[n] for n in numbers], 1) for each in (train, val))
        for kind, hidden in HIDDEN.items():
            probe = fit(shown, labels, hidden, seed)
            samples[f"{kind}/{name}"] = Samples(confusions(probe, asked, labels), "mean_iou")
    last = f"layer {LAYERS[-1]}"
    gains = {
        f"gain/{kind}": samples[f"{kind}/mixed"].score - samples[f"{kind}/{last}"].score
        for kind in HIDDEN
    }
    return Measured(gains, samples)


def layers_of(trained: Trained, split: Split) -> dict[int, Maps]:
    """Return the maps after each of LAYERS, of one forward a picture."""
    names = {number: layer_name(number) for number in LAYERS}
    parts: dict[int, list[Tensor]] = {number: [] for number in LAYERS}
    for _, pictures in batches_of(split, HIGH):
        said = trained.target.extract(pictures, list(names.values()))
        for number, name in names.items():
            parts[number].append(said[name])
    return {number: torch.cat(maps) for number, maps in parts.items()}


def fit(maps: Maps, labels: LabelMaps, hidden: int, seed: int) -> nn.Module:
    """Fit batch norm and one linear layer, or two with GELU, to the label at each cell's middle."""
    x, y = cells(maps, labels.train)
    count = len(labels.classes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        body = nn.Sequential(nn.Linear(x.shape[1], hidden), nn.GELU()) if hidden else nn.Identity()
        head = nn.Linear(hidden or x.shape[1], count)
    probe = nn.Sequential(nn.BatchNorm1d(x.shape[1], affine=False), body, head)
    optimizer = torch.optim.AdamW(probe.parameters(), lr=RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / STEPS)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(STEPS):
        drawn = torch.randint(len(x), (CELLS,), generator=generator)
        optimizer.zero_grad()
        F.cross_entropy(probe(x[drawn]), y[drawn]).backward()
        optimizer.step()
        schedule.step()
    return probe.eval()


def cells(
    maps: Maps, labels: Sequence[Map]
) -> tuple[Float[Tensor, "cells d"], Int[Tensor, " cells"]]:
    """Return features and label of every cell whose middle is labelled."""
    rows, columns = maps.shape[-2:]
    found = []
    for label in labels:
        at = [
            ((torch.arange(n) + 0.5) * side / n).long()
            for n, side in zip((rows, columns), label.shape, strict=True)
        ]
        found.append(torch.from_numpy(label)[at[0]][:, at[1]].flatten())
    y = torch.cat(found).long()
    known = y != IGNORED
    return maps.movedim(1, -1).flatten(0, 2)[known], y[known]


@torch.no_grad()
def confusions(
    probe: nn.Module, maps: Maps, labels: LabelMaps
) -> Int[np.ndarray, "n classes classes"]:
    """Return each picture's counts of [labelled, predicted], logits resized to its label map."""
    count, found = len(labels.classes), []
    for one, label in zip(maps, labels.val, strict=True):
        logits = probe(one.flatten(1).T).T.reshape(1, count, *one.shape[1:])
        logits = F.interpolate(logits, label.shape, mode="bilinear", align_corners=False)
        found.append(torch.from_numpy(confusion(label, logits[0].argmax(0).numpy(), count)))
    return torch.stack(found).numpy()


def comparisons() -> tuple[Comparison, ...]:
    """What mixing gives to each probe, and to which more."""
    pairs = [(kind, HIGHER if kind == "mlp" else None) for kind in HIDDEN]
    mixed = [
        Comparison(
            Side(STUDENT, f"{kind}/mixed"), Side(STUDENT, f"{kind}/layer {LAYERS[-1]}"), paper
        )
        for kind, paper in pairs
    ]
    return (*mixed, Comparison(Side(STUDENT, "gain/mlp"), Side(STUDENT, "gain/linear"), HIGHER))


FINDING = Finding(
    title="Intermediate layers help when mixed non-linearly",
    claim="Intermediate activations help heads that are not linear; no numbers are known to us "
    "(RADIOv2.5, finding 8).",
    how=f"Features after blocks {', '.join(map(str, LAYERS))} of the backbone (counted from 0), "
    "alone and side by side, CamVid at 256 px. Probes see single cells, and are as deep and as "
    "wide for one layer as for all; `gain` is mixed less the last layer alone.",
    arms=(Arm(STUDENT),),
    measure=measure,
    comparisons=comparisons(),
    tables=(Table("mIoU", ("linear/*", "mlp/*")), Table("Gain", ("gain/*",))),
    figure=Figure("bars", "mIoU", ("linear/*", "mlp/*")),
)
