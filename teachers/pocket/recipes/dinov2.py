"""pocket_dinov2: a ViT with registers that teaches itself, by DINOv2's objectives (2304.07193).

Image self-distillation (DINO), masked patches (iBOT) and KoLeo, with the losses of lightly; the
teacher is a moving average of the student. It needs no labels and no captions. With `start` the
backbone begins as a ViT that has learnt the trunk's dense features; without, from scratch.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, UInt8
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm
from torchvision.transforms import v2

from teachers.pocket.recipes.checkpoint import Checkpoint, Origin
from teachers.pocket.recipes.text import schedule
from teachers.pocket.recipes.vit import PATCH, build_vit, normalised

PROTOTYPES = 2048
BOTTLENECK = 128
LOCALS = 4
GLOBAL, LOCAL = 96, 48  # px
BATCH = 32
SPREAD = 0.1  # KoLeo's weight
LR = {"scratch": 1e-3, "trunk": 3e-4, "heads": 1e-3}
WARMUP = {"scratch": 50, "trunk": 200}  # of the backbone: new heads must not spoil what it knows
MOMENTUM = 0.994  # of the teacher at the start; it rises to 1
MASKED = (0.1, 0.5)  # share of patches that are hidden, in half of the pictures


class Heads(nn.Module):
    """DINO's head: an MLP, a unit bottleneck, weight-normalised prototypes.

    What all pictures have in common must not drown what they differ in, or the first centre leaves
    nothing to learn: hence the batch norm and no biases at the start.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.BatchNorm1d(width, affine=False),
            nn.Linear(width, 512),
            nn.GELU(),
            nn.Linear(512, 512),
            nn.GELU(),
            nn.Linear(512, BOTTLENECK),
        )
        for layer in self.mlp:
            if isinstance(layer, nn.Linear):
                nn.init.kaiming_normal_(layer.weight)
                nn.init.zeros_(layer.bias)
        self.last = weight_norm(nn.Linear(BOTTLENECK, PROTOTYPES, bias=False))
        self.last.parametrizations.weight.original0.data.fill_(1)
        self.last.parametrizations.weight.original0.requires_grad_(False)

    def forward(self, tokens: Float[Tensor, "*b width"]) -> Float[Tensor, "*b prototypes"]:
        """Return the logits of the prototypes."""
        logits: Tensor = self.last(F.normalize(self.mlp(tokens), dim=-1))
        return logits


class Network(nn.Module):
    """The ViT, its heads for the class token and for patches, and the token of hidden patches."""

    def __init__(self, start: Mapping[str, Tensor] | None) -> None:
        super().__init__()
        self.vit = build_vit()
        if start is not None:
            self.vit.load_state_dict(dict(start))
        self.image_head, self.patch_head = Heads(self.vit.embed_dim), Heads(self.vit.embed_dim)
        self.hidden = nn.Parameter(torch.zeros(self.vit.embed_dim))

    def tokens(
        self, pixels: Float[Tensor, "b 3 h w"], mask: Bool[Tensor, "b rows columns"] | None = None
    ) -> tuple[Float[Tensor, "b width"], Float[Tensor, "b patches width"]]:
        """Return the class token and the patches; hidden ones are replaced before the blocks."""
        patches = self.vit.patch_embed(pixels)
        if mask is not None:
            patches = torch.where(mask[..., None], self.hidden, patches)
        tokens = self.vit.norm(self.vit.blocks(self.vit._pos_embed(patches)))
        return tokens[:, 0], tokens[:, self.vit.num_prefix_tokens :]


def draw_masks(batch: int, side: int, generator: torch.Generator) -> Bool[Tensor, "b rows columns"]:
    """Return which patches are hidden: one block in every other picture."""
    masks = torch.zeros(batch, side, side, dtype=torch.bool)
    for mask in masks[::2]:
        share = MASKED[0] + (MASKED[1] - MASKED[0]) * float(torch.rand((), generator=generator))
        height = int(
            max(
                1,
                min(
                    side,
                    round(
                        side * share**0.5 * 2 ** float(torch.rand((), generator=generator) - 0.5)
                    ),
                ),
            )
        )
        width = max(1, min(side, round(side * side * share / height)))
        top = int(torch.randint(side - height + 1, (), generator=generator))
        left = int(torch.randint(side - width + 1, (), generator=generator))
        mask[top : top + height, left : left + width] = True
    return masks


class Crops:
    """Two global and several local views of each picture, as DINO makes them."""

    def __init__(self) -> None:
        colour = v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.2, 0.1)], p=0.8)
        common = [v2.RandomHorizontalFlip(), colour, v2.RandomGrayscale(0.2)]
        self.large = v2.Compose(
            [v2.RandomResizedCrop(GLOBAL, (0.35, 1.0), antialias=True), *common]
        )
        self.small = v2.Compose(
            [v2.RandomResizedCrop(LOCAL, (0.08, 0.35), antialias=True), *common]
        )

    def __call__(self, images: UInt8[Tensor, "b 3 h w"]) -> list[Float[Tensor, "b 3 h w"]]:
        """Return two batches of global views and LOCALS of local ones, normalised."""
        makers = [self.large] * 2 + [self.small] * LOCALS
        return [
            normalised(torch.stack([make(image) for image in images]).float() / 255)
            for make in makers
        ]


class Losses(nn.Module):
    """DINOv2's three losses as lightly has them; the first two keep a centre."""

    def __init__(self) -> None:
        super().__init__()
        from lightly.loss import DINOLoss, IBOTPatchLoss, KoLeoLoss

        self.image, self.patch = DINOLoss(PROTOTYPES), IBOTPatchLoss(PROTOTYPES)
        self.spread = KoLeoLoss()

    def forward(
        self, student: Network, teacher: Network, shown: Sequence[Tensor], mask: Tensor, warm: float
    ) -> dict[str, Tensor]:
        """Return the losses of two global views, then local ones; `warm` sharpens the teacher."""
        both = torch.cat(list(shown[:2]))
        with torch.no_grad():
            summary, patches = teacher.tokens(both)
            wanted = list(teacher.image_head(summary).chunk(2))
            wanted_patches = teacher.patch_head(patches[mask.flatten(1)])
        summary, patches = student.tokens(both, mask)
        small, _ = student.tokens(torch.cat(list(shown[2:])))
        said = [*student.image_head(summary).chunk(2), *student.image_head(small).chunk(LOCALS)]
        hidden = student.patch_head(patches[mask.flatten(1)])
        first, second = (self.spread(part) for part in summary.chunk(2))
        return {
            "image": self.image(wanted, said, teacher_temp=warm),
            "patch": self.patch(wanted_patches, hidden, mask, warm),
            "spread": SPREAD * (first + second) / 2,
        }


def self_distil(
    images: UInt8[Tensor, "n 3 h w"],
    start: Mapping[str, Tensor] | None,
    path: Path,
    *,
    origin: Origin,
) -> tuple[dict[str, Tensor], list[dict[str, float]]]:
    """Train on pictures alone; return the teacher's ViT and the curve."""
    seed, steps = origin.seed, origin.steps
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    student, losses = Network(start), Losses()
    teacher = copy.deepcopy(student).requires_grad_(False)
    begun = "scratch" if start is None else "trunk"
    weights = [weight for weight in student.parameters() if weight.requires_grad]
    backbone = list(student.vit.parameters())
    known = {id(weight) for weight in backbone}
    heads = [weight for weight in weights if id(weight) not in known]
    groups = [
        {"params": backbone, "peak": LR[begun], "warmup": WARMUP[begun]},
        {"params": heads, "peak": LR["heads"], "warmup": WARMUP["scratch"]},
    ]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.04, fused=True)
    parts = {"student": student, "teacher": teacher, "losses": losses, "optimizer": optimizer}
    saved = Checkpoint(path, parts, generator, origin)
    crops = Crops()
    while saved.step < steps:
        share = saved.step / steps
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * schedule(saved.step, steps, group["warmup"])
        torch.manual_seed(seed * steps + saved.step)
        shown = crops(images[torch.randint(len(images), (BATCH,), generator=generator)])
        mask = draw_masks(2 * BATCH, GLOBAL // PATCH, generator)
        warm = 0.04 + 0.03 * min(1, share / 0.3)
        found = losses(student, teacher, shown, mask, warm)
        optimizer.zero_grad(set_to_none=True)
        torch.stack(list(found.values())).sum().backward()
        nn.utils.clip_grad_norm_(weights, 3.0)
        optimizer.step()
        with torch.no_grad():
            for old, new in zip(teacher.parameters(), student.parameters(), strict=True):
                old.lerp_(new, (1 - MOMENTUM) * (1 - share))
        if saved.step % 50 == 0:
            saved.told(**{key: value.item() for key, value in found.items()})
        saved.done(saved.step == steps - 1)
    return dict(teacher.vit.state_dict()), saved.curve
