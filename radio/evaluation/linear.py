"""Task `linear`: a linear classifier on a target's frozen summaries."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from radio.errors import RadioError
from radio.evaluation.labelled import Labelled, labelled, per_class
from radio.evaluation.pictures import Pictures
from radio.evaluation.result import Options, Result, bootstrap
from radio.evaluation.target import Target
from radio.progress import Report

# Of the mean loss, from the strongest; each one's probe starts the next.
PENALTIES = (1.0, 0.1, 0.01, 0.001, 0.0001)
FOLD = 5  # one train picture in so many chooses the penalty
STEPS = 100  # of L-BFGS at most, each with its line search
HISTORY = 10
TOP = 5


@dataclass(frozen=True)
class Probe:
    """logits = x W^T + b on standardised x."""

    weight: Float[Tensor, "classes dim"]
    bias: Float[Tensor, " classes"]

    def __call__(self, values: Float[Tensor, "n dim"]) -> Float[Tensor, "n classes"]:
        """Return the logits."""
        return F.linear(values, self.weight, self.bias)


def linear(
    target: Target, data: Pictures, options: Options, progress: Report | None = None
) -> Result:
    """Score top-1 accuracy of multinomial logistic regression on standardised summaries.

    Full-batch L-BFGS on a penalty of |W|^2, the channels standardised by the train split. The
    penalty is the best of five on a seeded fifth of that split; the classifier is then fitted on
    the whole of it. Figures are not those of DINOv2's protocol (2304.07193): SGD over a grid of
    learning rates, on the class token, or with the mean of patches, of one block or several, with
    crops and flips, and the best of the grid by its accuracy on the val split.

    Raises:
        RadioError: fewer than two classes or ten train pictures, or as `labelled`.
    """
    rows = labelled(target, data, options, progress)
    if len(rows.classes) < 2 or len(rows.train) < 2 * FOLD:
        raise RadioError(
            f"{data.folder} has {len(rows.train)} train pictures of {len(rows.classes)} classes "
            f"to score; expected {2 * FOLD} or more, of two classes or more"
        )
    train, val = standardised(rows.train, rows.val)
    by_penalty = _on_a_fold(train, rows, options.seed)
    best = max(by_penalty, key=lambda penalty: (by_penalty[penalty], penalty))
    probe = _path(train, rows.train_labels, len(rows.classes), best)[best]
    logits = probe(val)
    samples = (logits.argmax(dim=1) == rows.val_labels).double().numpy()
    top = min(TOP, len(rows.classes))
    among_top = (logits.topk(top).indices == rows.val_labels[:, None]).any(dim=1)
    details = {
        "score_is": "top-1 accuracy",
        "pictures": len(val),
        "train_pictures": len(train),
        "classes": len(rows.classes),
        "penalty": best,
        f"top{top}": float(among_top.double().mean()),
        "train_top1": float((probe(train).argmax(dim=1) == rows.train_labels).double().mean()),
        "curve": {
            "label": "penalty",
            "log": True,
            "x": list(PENALTIES),
            "y": {"top-1 on a fold of train": [by_penalty[penalty] for penalty in PENALTIES]},
        },
        "per_class": per_class(samples, rows.val_labels, rows.names),
    }
    interval = bootstrap(samples, seed=options.seed)
    return Result("linear", target.name, float(samples.mean()), interval, details, samples)


def standardised(
    train: Float[Tensor, "train dim"], val: Float[Tensor, "val dim"]
) -> tuple[Tensor, Tensor]:
    """Return both less the train split's mean, over its deviation; constant channels become 0."""
    deviation, mean = torch.std_mean(train, dim=0, correction=0)
    scale = torch.where(deviation > 0, 1 / deviation, 0.0)
    return (train - mean) * scale, (val - mean) * scale


def logistic_regression(
    values: Float[Tensor, "n dim"],
    labels: Int[Tensor, " n"],
    num_classes: int,
    penalty: float,
    start: Probe | None = None,
) -> Probe:
    """Return the least of mean cross entropy + penalty |W|^2 / 2 by full-batch L-BFGS.

    In the precision of `values`; the bias bears no penalty. scikit-learn's LogisticRegression has
    C = 1 / (penalty n).
    """
    dim = values.shape[1]
    weight = torch.zeros(num_classes, dim) if start is None else start.weight.clone()
    bias = torch.zeros(num_classes) if start is None else start.bias.clone()
    weight, bias = weight.to(values.dtype).requires_grad_(), bias.to(values.dtype).requires_grad_()
    optimizer = torch.optim.LBFGS(
        [weight, bias],
        max_iter=STEPS,
        history_size=HISTORY,
        tolerance_grad=1e-6,
        tolerance_change=1e-10,
        line_search_fn="strong_wolfe",
    )

    def loss() -> float:
        optimizer.zero_grad()
        entropy = F.cross_entropy(F.linear(values, weight, bias), labels)
        total = entropy + penalty / 2 * weight.square().sum()
        total.backward()
        return float(total.detach())

    optimizer.step(loss)
    return Probe(weight.detach(), bias.detach())


def _path(
    values: Float[Tensor, "n dim"], labels: Int[Tensor, " n"], num_classes: int, last: float
) -> dict[float, Probe]:
    """Return the probe of each penalty down to `last`."""
    probes: dict[float, Probe] = {}
    probe: Probe | None = None
    for penalty in PENALTIES:
        probe = logistic_regression(values, labels, num_classes, penalty, probe)
        probes[penalty] = probe
        if penalty == last:
            break
    return probes


def _on_a_fold(train: Float[Tensor, "n dim"], rows: Labelled, seed: int) -> dict[float, float]:
    """Return each penalty's top 1 on a seeded fifth, fitted on the rest."""
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))
    held, fitted = order[: len(train) // FOLD], order[len(train) // FOLD :]
    labels = rows.train_labels
    probes = _path(train[fitted], labels[fitted], len(rows.classes), PENALTIES[-1])
    return {
        penalty: float((probe(train[held]).argmax(dim=1) == labels[held]).double().mean())
        for penalty, probe in probes.items()
    }
