"""RADIOv2.5's finding 8: intermediate layers under a linear and under an MLP probe."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from benchmarks.findings.declare import HIGH, HIGHER, Finding, within
from benchmarks.findings.measures import Samples, Scores, batches_of
from benchmarks.findings.trained import Trained
from radio.encoder.layers import layer_name
from radio.evaluation.label_maps import IGNORED, LabelMaps, Map, label_maps
from radio.evaluation.pictures import Split
from radio.evaluation.result import Options
from radio.evaluation.segmentation import Probe, confusions

LAYERS = (2, 5, 8, 11)
LAST = f"layer {LAYERS[-1]}"
HIDDEN = {"linear": 0, "mlp": 256}
STEPS, CELLS, RATE = 400, 2048, 2e-3  # AdamW on random cells, the rate falling to 0
Maps = Float[Tensor, "n d h w"]


def measure(trained: Trained) -> Scores:
    """Measure mIoU of both probes on the features of single layers and of all together."""
    data, seed = trained.material.streets, trained.config.seed
    labels = label_maps(data, Options())
    train, val = (layers_of(trained, data.split(split)) for split in ("train", "val"))
    scores = Scores()
    for kind, hidden in HIDDEN.items():
        found = {}
        for name, numbers in {**{f"layer {n}": (n,) for n in LAYERS}, "mixed": LAYERS}.items():
            shown, asked = (torch.cat([each[n] for n in numbers], 1) for each in (train, val))
            counts = probed(shown, asked, labels, hidden, seed)
            found[name] = Samples(counts, "mean_iou")
        scores |= {f"{kind}/{name}": samples for name, samples in found.items()}
        scores[f"gain/{kind}"] = found["mixed"].score() - found[LAST].score()
    return scores


def layers_of(trained: Trained, split: Split) -> dict[int, Maps]:
    """Return the maps after each of LAYERS, of one forward a picture."""
    names = [layer_name(number) for number in LAYERS]
    said = [trained.target.extract(pictures, names) for _, pictures in batches_of(split, HIGH)]
    return {
        number: torch.cat([maps[name] for maps in said])
        for number, name in zip(LAYERS, names, strict=True)
    }


def probed(
    train: Maps, val: Maps, labels: LabelMaps, hidden: int, seed: int
) -> Int[np.ndarray, "n classes classes"]:
    """Return the val pictures' counts of [labelled, predicted] by a probe of the train split."""
    body, head = fit(train, labels, hidden, seed)
    with torch.no_grad():
        cells_of_val = val.movedim(1, -1)
        deep = body(cells_of_val.flatten(0, -2)).unflatten(0, cells_of_val.shape[:-1])
    width = head.in_features
    probe = Probe(torch.zeros(width), torch.ones(width), head.weight.detach(), head.bias.detach())
    return confusions(probe, deep.movedim(-1, 1), labels.val)


def fit(maps: Maps, labels: LabelMaps, hidden: int, seed: int) -> tuple[nn.Module, nn.Linear]:
    """Fit batch norm and one linear layer, or two with GELU, to the label at each cell's middle."""
    x, y = cells(maps, labels.train)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        deep = [nn.Linear(x.shape[1], hidden), nn.GELU()] if hidden else []
        head = nn.Linear(hidden or x.shape[1], len(labels.classes))
    body = nn.Sequential(nn.BatchNorm1d(x.shape[1], affine=False), *deep)
    probe = nn.Sequential(body, head)
    optimizer = torch.optim.AdamW(probe.parameters(), lr=RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / STEPS)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(STEPS):
        drawn = torch.randint(len(x), (CELLS,), generator=generator)
        optimizer.zero_grad()
        F.cross_entropy(probe(x[drawn]), y[drawn]).backward()
        optimizer.step()
        schedule.step()
    return body.eval(), head


def cells(
    maps: Maps, labels: Sequence[Map]
) -> tuple[Float[Tensor, "cells d"], Int[Tensor, " cells"]]:
    """Return features and label of every cell whose middle is labelled."""
    found = []
    for label in labels:
        rows, columns = (
            ((torch.arange(count) + 0.5) * side / count).long()
            for count, side in zip(maps.shape[-2:], label.shape, strict=True)
        )
        found.append(torch.from_numpy(label)[rows][:, columns].flatten())
    y = torch.cat(found).long()
    known = y != IGNORED
    return maps.movedim(1, -1).flatten(0, 2)[known], y[known]


FINDING = Finding(
    title="Intermediate layers help when mixed non-linearly",
    claim="Intermediate activations help heads that are not linear; no numbers are known to us "
    "(RADIOv2.5, finding 8).",
    how=f"Features after blocks {', '.join(map(str, LAYERS))} of the backbone (counted from 0), "
    "alone and side by side, CamVid at 256 px. Probes see single cells, and are as deep and as "
    "wide for one layer as for all; `gain` is mixed less the last layer alone.",
    measure=measure,
    comparisons=(
        within("linear/mixed", f"linear/{LAST}", None),
        within("mlp/mixed", f"mlp/{LAST}", HIGHER),
        within("gain/mlp", "gain/linear", HIGHER),
    ),
    tables={"mIoU": ("linear/*", "mlp/*"), "Gain": ("gain/*",)},
    label="mIoU",
    points=("linear/*", "mlp/*"),
)
