"""A timm ViT that learns the trunk's dense features: where pocket_dinov2 and pocket_sam start from.

Targets are the largest principal components of the trunk's map at every patch, and the direction of
its pooled features for the class token.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from teachers.base import IMAGENET_MEAN, IMAGENET_STD
from teachers.pocket.recipes.checkpoint import Checkpoint, Origin
from teachers.pocket.recipes.optim import build_muon
from teachers.pocket.recipes.text import schedule
from teachers.pocket.recipes.trunk import WIDTH, Views

State = dict[str, Tensor]

MODEL = "vit_tiny_patch16_224"
OPTIONS: dict[str, Any] = {
    "img_size": 128,
    "depth": 10,
    "reg_tokens": 4,
    "no_embed_class": True,
    "dynamic_img_size": True,
}
PATCH = 16
LR = 3e-3
BATCH = 64


def build_vit() -> Any:
    """Return timm's ViT-Ti/16 with ten blocks and four registers, new weights.

    Attention is not fused: on a CPU that is faster for so few tokens.
    """
    model = timm.create_model(MODEL, num_classes=0, **OPTIONS)
    blocks: Any = model.blocks
    for block in blocks:
        block.attn.fused_attn = False
    return model


def normalised(pixels: Float[Tensor, "*b 3 h w"]) -> Float[Tensor, "*b 3 h w"]:
    """Return pixels of [0, 1] less ImageNet's mean over its deviation."""
    mean, std = (torch.tensor(channels).view(3, 1, 1) for channels in (IMAGENET_MEAN, IMAGENET_STD))
    return (pixels - mean) / std


def shown(crops: UInt8[Tensor, "b 3 h w"], size: int) -> Float[Tensor, "b 3 size size"]:
    """Return crops at another size, normalised."""
    pixels = crops.float() / 255
    if pixels.shape[-1] != size:
        pixels = F.interpolate(pixels, (size, size), mode="bilinear", antialias=True)
    return normalised(pixels)


class Heads(nn.Module):
    """What maps the ViT's tokens to the trunk's features; thrown away afterwards."""

    def __init__(self, width: int, components: int) -> None:
        super().__init__()
        self.patches = nn.Linear(width, components)
        self.summary = nn.Linear(width, WIDTH)


def distil_trunk(
    model: Any, views: Views, path: Path, *, size: int, origin: Origin
) -> list[dict[str, float]]:
    """Train the ViT on cached views (`crops`, `maps`, `pooled`); return the curve.

    `size` is the side in px that the ViT sees them at; the trunk saw them at theirs.
    """
    torch.manual_seed(origin.seed)
    heads = Heads(model.embed_dim, views["maps"].shape[2])
    weights = [*model.parameters(), *heads.parameters()]
    optimizer = build_muon(model.blocks, weights, LR)
    generator = torch.Generator().manual_seed(origin.seed)
    parts = {"model": model, "heads": heads, "optimizer": optimizer}
    saved, steps = Checkpoint(path, parts, generator, origin), origin.steps
    mean = views["pooled"][0].float().mean(0)
    spread = views["maps"][0, ::8].float().square().mean()
    num_views, count = views["crops"].shape[:2]
    while saved.step < steps:
        for group in optimizer.param_groups:
            group["lr"] = LR * schedule(saved.step, steps)
        which = torch.randint(num_views, (BATCH,), generator=generator)
        at = torch.randint(count, (BATCH,), generator=generator)
        tokens = model.forward_features(shown(views["crops"][which, at], size))
        wanted = views["maps"][which, at].float()
        grid = (size // PATCH,) * 2
        if wanted.shape[-1] != grid[0]:
            wanted = F.interpolate(wanted, grid, mode="bilinear", antialias=True)
        said = heads.patches(tokens[:, model.num_prefix_tokens :])
        dense = F.mse_loss(said.transpose(1, 2).unflatten(2, grid), wanted) / spread
        pooled = views["pooled"][which, at].float() - mean
        whole = 1 - F.cosine_similarity(heads.summary(tokens[:, 0]), pooled, dim=1).mean()
        optimizer.zero_grad(set_to_none=True)
        (dense + whole).backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        if saved.step % 50 == 0:
            saved.told(dense=dense.item(), summary=whole.item())
        saved.done(saved.step == steps - 1)
    return saved.curve
