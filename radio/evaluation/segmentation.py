"""Task `segmentation`: classes of pixels from a linear probe on a frozen feature map."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Shaped, UInt8
from numpy.typing import NDArray
from torch import Tensor

from radio.errors import RadioError
from radio.evaluation.features import features_of
from radio.evaluation.label_maps import IGNORED, Map, label_maps
from radio.evaluation.labelled import per_class
from radio.evaluation.pictures import Pictures
from radio.evaluation.result import Options, Result, bootstrap
from radio.evaluation.target import Target
from radio.progress import Report, told

STEPS = 1500
PICTURES = 16  # of a step
PIXELS = 512  # of a picture in a step
RATE = 2e-2
WARM_UP = 0.02  # of the steps
INITIAL = 0.01  # deviation of the first weights
Maps = Float[Tensor, "pictures dim h w"]


@dataclass(frozen=True)
class Probe:
    """Standardised features times weights: what RADIO's batch norm and linear layer come to."""

    mean: Float[Tensor, " dim"]
    deviation: Float[Tensor, " dim"]
    weight: Float[Tensor, "classes dim"]
    bias: Float[Tensor, " classes"]

    def logits(self, maps: Maps) -> Float[Tensor, "pictures classes h w"]:
        """Return a class's logit for every cell of the features."""
        scaled = (maps - self.mean[:, None, None]) / self.deviation[:, None, None]
        product = torch.einsum("pdhw,cd->pchw", scaled, self.weight)
        return product + self.bias[:, None, None]


def segmentation(
    target: Target, data: Pictures, options: Options, progress: Report | None = None
) -> Result:
    """Measure mIoU of a linear probe over the classes that occur in the val split's labels.

    As RADIO's and DINOv3's ADE20k probes (batch norm, linear, AdamW without decay, bilinear
    logits), shortened: 1,500 steps of 16 pictures, squashed to one size. The confusion matrix is
    one over all pictures, at the label maps' own size. `samples` are the pictures' confusion
    matrices [N, labelled, predicted], for `mean_iou`.

    Raises:
        RadioError: as `label_maps`, features that are no map or not finite, or no labelled pixel.
    """
    name = options.features or "features"
    target.check(name)
    labels = label_maps(data, options)
    train, val = (
        features_of(target, data.split(split), name, options.size, progress)
        for split in ("train", "val")
    )
    if train.ndim != 4:
        raise RadioError(f"'{name}' is one vector a picture; segmentation needs a feature map")
    count = len(labels.classes)
    probe = fit_probe(train, labels.train, count, options.seed, progress)
    samples = confusions(probe, val, labels.val)
    total = samples.sum(axis=0, dtype=np.int64)
    if not total.any():
        raise RadioError(f"no pixel of the val maps of {data.folder} is labelled")
    ious, present = class_ious(total), total.sum(axis=1) > 0
    unseen = sorted(set(np.flatnonzero(present)) - _seen(labels.train))
    details = {
        "score_is": "mIoU",
        "pictures": len(val),
        "train_pictures": len(train),
        "output": name,
        "size": target.size_for(name) if options.size is None else options.size,
        "grid": list(train.shape[-2:]),
        "classes": int(present.sum()),
        "ignored_values": list(labels.ignored),
        "never_seen_in_train": [labels.names[at] for at in unseen],
        "pixel_accuracy": float(np.trace(total) / total.sum()),
        "per_class": per_class(
            ious[present], torch.from_numpy(np.flatnonzero(present)), labels.names
        ),
        "steps": STEPS,
    }
    interval = bootstrap(_counts(samples), _mean_of_counts, seed=options.seed)
    return Result("segmentation", target.name, mean_iou(samples), interval, details, samples)


def fit_probe(
    maps: Maps,
    labels: Sequence[Map],
    num_classes: int,
    seed: int,
    progress: Report | None = None,
) -> Probe:
    """Fit a probe by AdamW on cross entropy at random pixels of random pictures.

    Bilinear logits at drawn pixels estimate the loss over all pixels without bias; shares of the
    labels in each feature cell would not, since they leave out the interpolation. The rate rises
    linearly to RATE and falls linearly to 0.

    Raises:
        RadioError: features that are not finite, or no labelled pixel in any map.
    """
    mean, deviation = _moments(maps)
    usable = [at for at, found in enumerate(labels) if (found != IGNORED).any()]
    if not usable:
        raise RadioError("no pixel of the train maps is labelled; expected some to learn from")
    generator = torch.Generator().manual_seed(seed)
    weight = torch.empty(num_classes, maps.shape[1]).normal_(0, INITIAL, generator=generator)
    probe = Probe(
        mean, deviation, weight.requires_grad_(), torch.zeros(num_classes).requires_grad_()
    )
    optimizer = torch.optim.AdamW([probe.weight, probe.bias], lr=RATE, weight_decay=0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, _rate)
    for _ in told(range(STEPS), STEPS, progress):
        drawn = torch.randint(len(usable), (PICTURES,), generator=generator).tolist()
        chosen = [usable[at] for at in drawn]
        wanted, places = _pixels([labels[at] for at in chosen], generator)
        logits = probe.logits(at_places(maps[chosen], places)[..., None])[..., 0]
        optimizer.zero_grad()
        losses = F.cross_entropy(logits, wanted, ignore_index=IGNORED, reduction="sum")
        (losses / max(1, int((wanted != IGNORED).sum()))).backward()
        optimizer.step()
        schedule.step()
    return Probe(mean, deviation, probe.weight.detach(), probe.bias.detach())


def at_places(
    maps: Maps, places: Float[Tensor, "pictures pixels 2"]
) -> Float[Tensor, "pictures dim pixels"]:
    """Return maps at (x, y) in [-1, 1] as a bilinear resize would (align_corners False).

    A probe of resized features is the resized logits of a probe: both are linear, weights sum to 1.
    """
    found: Tensor = F.grid_sample(
        maps, places[:, :, None], mode="bilinear", padding_mode="border", align_corners=False
    )
    return found[..., 0]


@torch.no_grad()
def confusions(
    probe: Probe, maps: Maps, labels: Sequence[Map]
) -> Int[np.ndarray, "pictures classes classes"]:
    """Return each picture's counts of [labelled, predicted], at its label map's size."""
    count = len(probe.bias)
    found = np.zeros((len(maps), count, count), dtype=np.int32)
    for at, wanted in enumerate(labels):
        logits = F.interpolate(
            probe.logits(maps[at : at + 1]), wanted.shape, mode="bilinear", align_corners=False
        )
        found[at] = confusion(wanted, logits[0].argmax(dim=0).numpy(), count)
    return found


def confusion(
    labelled: UInt8[np.ndarray, "h w"], predicted: Int[np.ndarray, "h w"], count: int
) -> Int[np.ndarray, "classes classes"]:
    """Count the pixels of each (labelled, predicted), ignored ones left out."""
    known = labelled != IGNORED
    pairs = labelled[known].astype(np.int64) * count + predicted[known]
    return np.bincount(pairs, minlength=count * count).reshape(count, count)


def class_ious(total: Shaped[np.ndarray, "classes classes"]) -> Float[np.ndarray, " classes"]:
    """Return intersection over union of each class; 0 for one that is nowhere."""
    return _ious(_counts(total[None])[0])


def mean_iou(samples: NDArray[Any]) -> float:
    """Return mIoU from pictures' confusion matrices, over the classes that are labelled in them."""
    return _mean_of_counts(_counts(samples))


def _counts(
    samples: Shaped[np.ndarray, "pictures classes classes"],
) -> Shaped[np.ndarray, "pictures 3 classes"]:
    """Return right, labelled and predicted pixels: all of a confusion matrix that mIoU needs."""
    right = np.diagonal(samples, axis1=1, axis2=2)
    return np.stack([right, samples.sum(axis=2), samples.sum(axis=1)], axis=1)


def _ious(counts: Shaped[np.ndarray, "3 classes"]) -> Float[np.ndarray, " classes"]:
    right, labelled, predicted = counts.astype(np.float64)
    union = labelled + predicted - right
    # A weighted class may have less than a pixel in all, but none is none.
    return np.asarray(right / np.where(union > 0, union, 1))


def _mean_of_counts(counts: NDArray[Any]) -> float:
    total = counts.sum(axis=0)
    present = total[1] > 0
    return float(_ious(total)[present].mean()) if present.any() else 0.0


def _moments(maps: Maps) -> tuple[Float[Tensor, " dim"], Float[Tensor, " dim"]]:
    """Return each channel's mean and deviation, 1 where it is constant, over pictures and cells."""
    total = torch.zeros(2, maps.shape[1], dtype=torch.float64)
    for part in maps.split(PICTURES):
        values = part.double()
        total += torch.stack([values.sum((0, 2, 3)), values.square().sum((0, 2, 3))])
    mean, square = total / (maps.numel() / maps.shape[1])
    deviation = (square - mean.square()).clamp_min(0).sqrt()
    if not bool(torch.isfinite(deviation).all()):
        raise RadioError("the train features are not finite; a probe cannot be fitted to them")
    # Below this the difference of squares is rounding, not spread.
    constant = deviation <= 1e-7 * square.sqrt()
    return mean.float(), deviation.masked_fill(constant, 1).float()


def _rate(step: int) -> float:
    warm = max(1, round(WARM_UP * STEPS))
    return min(1.0, (step + 1) / warm) * (1 - step / STEPS)


def _pixels(labels: Sequence[Map], generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw pixels: their labels [pictures, PIXELS] and centres (x, y) in [-1, 1]."""
    drawn = torch.rand(len(labels), PIXELS, 2, generator=generator, dtype=torch.float64).numpy()
    wanted = np.empty((len(labels), PIXELS), dtype=np.int64)
    places = np.empty((len(labels), PIXELS, 2), dtype=np.float32)
    for at, found in enumerate(labels):
        sides = np.array(found.shape[::-1])
        index = (drawn[at] * sides).astype(np.int64)
        wanted[at] = found[index[:, 1], index[:, 0]]
        places[at] = (2 * index + 1) / sides - 1
    return torch.from_numpy(wanted), torch.from_numpy(places)


def _seen(labels: Sequence[Map]) -> set[int]:
    return {int(value) for found in labels for value in np.unique(found)}
