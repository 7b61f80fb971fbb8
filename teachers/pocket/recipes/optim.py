"""Muon for the matrices of transformers, AdamW for everything else."""

from __future__ import annotations

import functools
from collections.abc import Iterable

import torch
from torch import nn

WEIGHT_DECAY = 0.02


def build_muon(
    blocks: nn.Module, others: Iterable[nn.Parameter], lr: float
) -> torch.optim.Optimizer:
    """Return timm's Muon (Jordan 2024), orthogonalising in float32.

    timm does so in bfloat16, which a CPU without such instructions emulates a hundred times slower.
    """
    from timm.optim import muon

    if not isinstance(muon.zeropower_via_newtonschulz, functools.partial):
        muon.zeropower_via_newtonschulz = functools.partial(
            muon.zeropower_via_newtonschulz, dtype=torch.float32
        )
    matrices = [weight for weight in blocks.parameters() if weight.ndim == 2]
    known = {id(weight) for weight in matrices}
    rest = [weight for weight in others if id(weight) not in known and weight.requires_grad]
    groups = [
        {"params": matrices, "weight_decay": WEIGHT_DECAY},
        {"params": rest, "weight_decay": WEIGHT_DECAY, "use_fallback": True},
    ]
    optimizer: torch.optim.Optimizer = muon.Muon(
        groups, lr=lr, nesterov=True, betas=(0.9, 0.98), adjust_lr_fn="match_rms_adamw"
    )
    return optimizer
