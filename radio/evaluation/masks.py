"""Task `masks`: SAM's own decoder on a target's SAM features, asked by a point or a box."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from numpy.typing import NDArray
from torch import Tensor

from radio.errors import RadioError
from radio.evaluation.features import features_of
from radio.evaluation.pictures import Pictures, Split
from radio.evaluation.prompts import SMALLEST_SHARE, Instance, instances_of, to_square
from radio.evaluation.result import PROMPTS, Options, Result, bootstrap, paired_bootstrap
from radio.evaluation.shapes import Shape, best_box_shape, best_point_shape, iou
from radio.evaluation.target import Target
from radio.progress import Report, told
from teachers.sam import MaskDecoder

LARGE_SHARE = 0.1  # of the picture's area: from here on an instance is large
Scores = Float[np.ndarray, " instances"]


@dataclass(frozen=True)
class Asked:
    """Every instance that is asked for: in which picture it is, and what it is."""

    pictures: list[int]
    instances: list[Instance]

    def by_picture(self, scores: Scores) -> Float[np.ndarray, "pictures 2"]:
        """Return (sum of scores, instances) of every picture that has one; weighted together."""
        places = np.unique(self.pictures, return_inverse=True)[1]
        return np.stack([np.bincount(places, scores), np.bincount(places)], axis=1)


def masks(
    target: Target, data: Pictures, options: Options, progress: Report | None = None
) -> Result:
    """Measure the mean IoU over instances of at least 1 % of their picture, crowds left out.

    Of SAM's three masks the one of the highest predicted IoU counts (Kirillov et al., 2304.02643,
    with multimask output), at the picture's own size. The score is that of `options.prompt`; both
    prompts are in the details, beside the best constant shape chosen on the train split, with the
    paired difference. `samples` are (sum of IoU, instances) of each picture that has one.

    Raises:
        RadioError: no instance maps, no instance large enough, a target without mask decoder, or
            features that are not those it reads.
    """
    adaptor = target.mask_adaptor(options.adaptor)
    name = options.features or target.output("features", adaptor)
    target.check(name)
    size = target.checked_size(options.size or target.size_for(name))
    train, val = data.split("train"), data.split("val")
    asked, known = asked_of(val), asked_of(train)
    decoder = target.mask_decoder(options.adaptor)
    maps = features_of(target, val, name, size, progress)
    if maps.ndim != 4 or maps.shape[1] != decoder.width:
        raise RadioError(
            f"'{name}' of '{target.name}' gives {list(maps.shape[1:])} a picture but the mask "
            f"decoder reads [{decoder.width}, h, w]; leave out --features, or name the adaptor "
            "that goes with it"
        )
    constants = {
        "point": best_point_shape(known.instances),
        "box": best_box_shape(known.instances),
    }
    scored = {
        prompt: _Scored.of(prompt, asked, decoder, maps, size, constants[prompt], progress)
        for prompt in PROMPTS
    }
    chosen = asked.by_picture(scored[options.prompt].best)
    details = {
        "score_is": f"mean IoU over instances, {options.prompt}",
        "pictures": len(chosen),
        "instances": len(asked.instances),
        "large_instances": int(_large(asked.instances).sum()),
        "prompt": options.prompt,
        "output": name,
        "size": size,
        "smallest_share": SMALLEST_SHARE,
        "large_share": LARGE_SHARE,
        "train_instances": len(known.instances),
        "rows": [row for each in scored.values() for row in each.rows(asked, options.seed)],
        "over_constant": {p: each.gain(asked, options.seed) for p, each in scored.items()},
        "best_of_the_masks": {p: float(each.oracle.mean()) for p, each in scored.items()},
    }
    interval = bootstrap(chosen, ratio, seed=options.seed)
    return Result("masks", target.name, ratio(chosen), interval, details, chosen)


def ratio(rows: NDArray[Any]) -> float:
    """Return the mean over instances from (sum, instances) of each picture."""
    total, count = rows.sum(axis=0)
    return float(total / count)


def asked_of(split: Split) -> Asked:
    """Return the instances of a split; RadioError when there are none or no maps of them."""
    found = [
        (at, instance)
        for at in range(len(split))
        for instance in instances_of(split.label_map(at), split.instances(at))
    ]
    if not found:
        raise RadioError(
            f"the split '{split.name}' has no instance of {SMALLEST_SHARE:.0%} or more of its "
            "picture that is no crowd; expected instance maps (png) and their json"
        )
    return Asked([at for at, _ in found], [instance for _, instance in found])


@torch.no_grad()
def decoded(
    decoder: MaskDecoder,
    features: Float[Tensor, "dim h w"],
    instances: Sequence[Instance],
    prompt: str,
    size: int,
) -> tuple[Bool[Tensor, "n masks height width"], Float[Tensor, "n masks"]]:
    """Return the masks of one picture's instances at its own size, and their predicted IoU.

    Logits are scaled bilinearly and cut at 0. A box is given as segment_anything's predictor
    gives it, a point by its pixel's index; pixels of the square of side `size`.
    """
    shape = instances[0].mask.shape
    points = boxes = None
    if prompt == "point":
        given = np.array([instance.point for instance in instances], dtype=np.float64)
        points = torch.from_numpy(to_square(given, shape, size))
    else:
        given = np.array([instance.box for instance in instances], dtype=np.float64)
        boxes = torch.from_numpy(to_square(given, shape, size))
    logits, quality = decoder(features, points, None, boxes, size)
    large = F.interpolate(logits, shape, mode="bilinear", align_corners=False)
    return large > 0, quality


@dataclass(frozen=True)
class _Scored:
    """IoU of every instance by one prompt: of the chosen mask, the best one, and a constant."""

    prompt: str
    best: Scores
    oracle: Scores
    shape: Shape
    constant: Scores

    @classmethod
    def of(
        cls,
        prompt: str,
        asked: Asked,
        decoder: MaskDecoder,
        maps: Float[Tensor, "pictures dim h w"],
        size: int,
        shape: Shape,
        progress: Report | None,
    ) -> _Scored:
        best, oracle = [], []
        pictures = sorted(set(asked.pictures))
        for picture in told(pictures, len(pictures), progress):
            inside = _of_picture(asked, picture)
            found, quality = decoded(decoder, maps[picture], inside, prompt, size)
            for instance, several, predicted in zip(inside, found.numpy(), quality, strict=True):
                overlaps = [iou(mask, instance.mask) for mask in several]
                best.append(overlaps[int(predicted.argmax())])
                oracle.append(max(overlaps))
        constant = [iou(shape.draw(instance), instance.mask) for instance in asked.instances]
        return cls(prompt, np.array(best), np.array(oracle), shape, np.array(constant))

    def rows(self, asked: Asked, seed: int) -> list[dict[str, Any]]:
        """Return the decoder's row and the constant shape's, with intervals."""
        large = _large(asked.instances)
        return [
            {
                "prompt": self.prompt,
                "by": by,
                "iou": float(scores.mean()),
                "interval": list(bootstrap(asked.by_picture(scores), ratio, seed=seed)),
                "small": _mean(scores[~large]),
                "large": _mean(scores[large]),
            }
            for by, scores in (("decoder", self.best), (self.shape.name, self.constant))
        ]

    def gain(self, asked: Asked, seed: int) -> dict[str, Any]:
        """Return the decoder's lead over the constant with its paired interval."""
        ours, theirs = asked.by_picture(self.best), asked.by_picture(self.constant)
        interval = paired_bootstrap(ours, theirs, ratio, seed=seed)
        return {"difference": ratio(ours) - ratio(theirs), "interval": list(interval)}


def _of_picture(asked: Asked, picture: int) -> list[Instance]:
    pairs = zip(asked.pictures, asked.instances, strict=True)
    return [instance for at, instance in pairs if at == picture]


def _large(instances: Iterable[Instance]) -> Bool[np.ndarray, " instances"]:
    return np.array([instance.share >= LARGE_SHARE for instance in instances])


def _mean(scores: Scores) -> float | None:
    return float(scores.mean()) if len(scores) else None
