"""Task `knn`: classify a picture by its nearest neighbours among the train split."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from radio.errors import RadioError
from radio.evaluation.labelled import labelled, per_class
from radio.evaluation.pictures import Pictures
from radio.evaluation.result import Options, Result, bootstrap
from radio.evaluation.target import Target
from radio.progress import Report

NEIGHBOURS = 20
TEMPERATURE = 0.07
CURVE = (10, 20, 50, 100)
TOP = 5
CHUNK = 256  # val pictures at once


def knn(target: Target, data: Pictures, options: Options, progress: Report | None = None) -> Result:
    """Score top-1 accuracy of a weighted vote of the 20 nearest neighbours.

    Cosine similarity s, weight exp(s / 0.07) (dinov2/eval/knn.py; RADIO's knn_classification.py);
    details hold top 5, accuracy per class, and top 1 over k.

    Raises:
        RadioError: fewer train pictures than neighbours, or as `labelled`.
    """
    rows = labelled(target, data, options, progress)
    count = len(rows.train)
    if count < NEIGHBOURS:
        raise RadioError(
            f"{data.folder} has {count} train pictures of the classes to score; expected "
            f"{NEIGHBOURS} or more, as many neighbours are asked"
        )
    ks = [k for k in CURVE if k <= count]
    votes = knn_votes(rows.train, rows.train_labels, rows.val, len(rows.classes), ks)
    hits = {k: votes[k].argmax(dim=1) == rows.val_labels for k in ks}
    samples = hits[NEIGHBOURS].double().numpy()
    top = min(TOP, len(rows.classes))
    among_top = (votes[NEIGHBOURS].topk(top).indices == rows.val_labels[:, None]).any(dim=1)
    details = {
        "score_is": "top-1 accuracy",
        "pictures": len(rows.val),
        "train_pictures": count,
        "classes": len(rows.classes),
        "k": NEIGHBOURS,
        "temperature": TEMPERATURE,
        f"top{top}": float(among_top.double().mean()),
        "curve": {
            "label": "neighbours",
            "x": ks,
            "y": {"top-1": [float(hits[k].double().mean()) for k in ks]},
        },
        "per_class": per_class(samples, rows.val_labels, rows.names),
    }
    interval = bootstrap(samples, seed=options.seed)
    return Result("knn", target.name, float(samples.mean()), interval, details, samples)


def knn_votes(
    train: Float[Tensor, "train dim"],
    labels: Int[Tensor, " train"],
    val: Float[Tensor, "val dim"],
    num_classes: int,
    ks: list[int],
    temperature: float = TEMPERATURE,
) -> dict[int, Tensor]:
    """Return for each k the classes' shares [val, classes] of the k nearest neighbours' weights.

    A neighbour of cosine s weighs exp(s / temperature), taken relative to the nearest.
    """
    unit = F.normalize(train, dim=1)
    found: dict[int, list[Tensor]] = {k: [] for k in ks}
    for chunk in val.split(CHUNK):
        nearest = (F.normalize(chunk, dim=1) @ unit.T).topk(max(ks), dim=1)
        similarity = nearest.values.double()
        weights = ((similarity - similarity[:, :1]) / temperature).exp()
        classes = labels[nearest.indices]
        for k in ks:
            votes = torch.zeros(len(chunk), num_classes, dtype=torch.float64)
            votes.scatter_add_(1, classes[:, :k], weights[:, :k])
            found[k].append(votes / votes.sum(dim=1, keepdim=True))
    return {k: torch.cat(parts) for k, parts in found.items()}
