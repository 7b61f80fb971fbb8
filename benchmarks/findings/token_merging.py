"""RADIOv2.5's finding 7: merged tokens against pooled and random ones, as many of each."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from benchmarks.findings.declare import HIGH, HIGHER, Finding, within
from benchmarks.findings.measures import Samples, Scores
from benchmarks.findings.trained import Trained
from radio.evaluation.features import features_of
from radio.evaluation.label_maps import label_maps
from radio.evaluation.result import Options
from radio.evaluation.segmentation import confusions, fit_probe
from student.token_merging import merge_tokens, unmerge

COUNTS = (64, 16, 4)  # of 16 x 16 tokens; squares, so that pooling has as many
Tokens = Float[Tensor, "n tokens width"]


def merged(tokens: Tokens, count: int, seed: int) -> Tokens:
    """Return each token's group mean, groups by similarity (ToMe)."""
    side = round(tokens.shape[1] ** 0.5)
    return unmerge(merge_tokens(tokens, count, (side, side)))


def pooled(tokens: Tokens, count: int, seed: int) -> Tokens:
    """Return each token's mean over its square of the grid."""
    side, coarse = round(tokens.shape[1] ** 0.5), round(count**0.5)
    maps = tokens.transpose(1, 2).unflatten(2, (side, side))
    means = F.avg_pool2d(maps, side // coarse)
    return F.interpolate(means, (side, side)).flatten(2).transpose(1, 2)


def random(tokens: Tokens, count: int, seed: int) -> Tokens:
    """Return for each token the most similar of `count` random ones: who is near is told, too."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.rand(tokens.shape[:2], generator=generator).argsort(dim=1)[:, :count]
    kept = tokens.gather(1, chosen[..., None].expand(-1, -1, tokens.shape[-1]))
    nearest = (F.normalize(tokens, dim=-1) @ F.normalize(kept, dim=-1).transpose(1, 2)).argmax(2)
    return kept.gather(1, nearest[..., None].expand(-1, -1, tokens.shape[-1]))


Way = Callable[[Tokens, int, int], Tokens]
WAYS: dict[str, Way] = {"merged": merged, "pooled": pooled, "random": random}


def measure(trained: Trained) -> Scores:
    """Measure what few tokens keep of maps: variance, and mIoU of a probe fitted to whole maps."""
    data, seed = trained.material.streets, trained.config.seed
    labels = label_maps(data, Options())
    train, val = (
        features_of(trained.target, data.split(split), "features", HIGH)
        for split in ("train", "val")
    )
    probe = fit_probe(train, labels.train, len(labels.classes), seed)
    scores: Scores = {"miou/whole": Samples(confusions(probe, val, labels.val), "mean_iou")}
    tokens = val.flatten(2).transpose(1, 2)
    for count in COUNTS:
        for name, way in WAYS.items():
            found = way(tokens, count, seed)
            scores[f"kept/{name}@{count}"] = Samples(kept(tokens, found), "explained")
            maps = found.transpose(1, 2).reshape(val.shape)
            counts = confusions(probe, maps, labels.val)
            scores[f"miou/{name}@{count}"] = Samples(counts, "mean_iou")
    return scores


def kept(tokens: Tokens, found: Tokens) -> Float[np.ndarray, "n 2"]:
    """Return sum (x - mean x)^2 and sum (x - found)^2 of each picture, the mean over all."""
    x = tokens.double()
    spread = (x - x.mean(dim=(0, 1))).square().sum(dim=(1, 2))
    left = (x - found.double()).square().sum(dim=(1, 2))
    return torch.stack([spread, left], dim=1).numpy()


FINDING = Finding(
    title="Token merging keeps most at high compression",
    claim="ToMe on the encoder's output gives a VLM 5.9 points more than pixel-unshuffle at 256 "
    "tokens, in the mean (RADIOv2.5, finding 7). Against it: C-RADIOv4 with pixel-unshuffle to 256 "
    "tokens 73.09, with ToMe 70.31 at 128 (RADIO1D, table 2).",
    how="256 tokens of the backbone's features of CamVid at 256 px become fewer: by merging, by "
    "averaging over squares, or by choosing at random, each token then standing for those most "
    "like it. `kept` is the share of the features' variance that is left when every token is "
    "replaced by what stands for it, `miou` that of a linear probe fitted to whole maps.",
    measure=measure,
    comparisons=tuple(
        within(f"{kind}/merged@{n}", f"{kind}/{other}@{n}", HIGHER)
        for kind in ("kept", "miou")
        for n in COUNTS
        for other in ("pooled", "random")
    ),
    tables={"Share of variance kept": ("kept/*",), "mIoU": ("miou/*",)},
    label="share of variance kept",
    lines=("kept/*",),
    across="tokens of 256",
)
