"""The optimizer, by timm's names, and its schedule as a pure function of the step."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from radio.config import OptimizerConfig
from radio.errors import RadioError
from radio.training.parallel import like, whole

# Tables that are added, not multiplied; of a spectral reparametrisation the weight itself, whose
# norm has no effect: PHI-S decays its scale (2410.01680, A.7).
NO_DECAY = ("pos_embed", "cls_token.token", "parametrizations.weight.original")
GROUP = "group "


@functools.cache
def newton_schulz() -> Callable[..., Tensor]:
    """Return timm's orthogonalisation of a gradient in float32."""
    from timm.optim import muon

    return functools.partial(muon.zeropower_via_newtonschulz, dtype=torch.float32)


def build_optimizer(student: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """Return timm's optimizer `config.name` (adamw, lamb, ...); no decay on vectors and tables.

    Raises:
        RadioError: timm knows no optimizer of that name.

    Recipe: AdamW; AM-RADIO (2312.06709); optimizer.name=adamw, optimizer.weight_decay;
    tests/test_recipe.py::test_the_recipes_optimizers_take_their_oracles_step.
    Recipe: LAMB; PHI-S (2410.01680) section A.7; optimizer.name=lamb, optimizer.weight_decay;
    tests/test_recipe.py::test_the_recipes_optimizers_take_their_oracles_step.
    Recipe: Muon at the length of an AdamW step; ours; optimizer.name=muon, optimizer.weight_decay;
    tests/test_recipe.py::test_the_recipes_optimizers_take_their_oracles_step.
    """
    from timm.optim import create_optimizer_v2, list_optimizers  # slow import

    named = [(name, p) for name, p in student.named_parameters() if p.requires_grad]
    plain = [p for name, p in named if p.ndim < 2 or name.endswith(NO_DECAY)]
    decayed = [p for name, p in named if not (p.ndim < 2 or name.endswith(NO_DECAY))]
    groups: list[dict[str, Any]] = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    if config.name not in list_optimizers():
        raise RadioError(
            f"optimizer.name is '{config.name}'; known: {', '.join(map(str, list_optimizers()))}"
        )
    if config.name.endswith("muon"):
        from timm.optim import muon  # not in every timm

        groups[1]["use_fallback"] = True  # AdamW: tables are matrices to timm, but not to Muon
        # timm orthogonalises in bfloat16, whatever the weights are: inexact, and on a CPU without
        # such instructions a hundred times slower.
        muon.zeropower_via_newtonschulz = newton_schulz()
    optimizer: torch.optim.Optimizer = create_optimizer_v2(groups, opt=config.name, lr=config.lr)
    return optimizer


def learning_rate(base: float, warmup_steps: int, stage_step: int, stage_steps: int) -> float:
    """Return the rate of a step: linear warm-up to `base` over `warmup_steps`, then cosine to zero.

    PHI-S restarts the cosine in every stage (2410.01680, A.7), so the step is the stage's own.

    Recipe: cosine that starts anew in each stage; PHI-S (2410.01680) section A.7; optimizer.lr,
    stages[].lr, stages[].steps;
    tests/test_stages.py::test_the_rate_warms_up_and_falls_to_zero_in_every_stage.
    Recipe: linear warm-up; ours; optimizer.warmup_steps;
    tests/test_stages.py::test_the_rate_warms_up_and_falls_to_zero_in_every_stage.
    """
    if stage_step < warmup_steps:
        return base * (stage_step + 1) / (warmup_steps + 1)
    span = max(1, stage_steps - warmup_steps)
    done = (stage_step - warmup_steps) / span
    return base * 0.5 * (1 + math.cos(math.pi * done))


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give every parameter group the step's rate."""
    for group in optimizer.param_groups:
        group["lr"] = rate


def optimizer_tensors(student: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return the optimizer's state as `<parameter>|<slot>` tensors.

    LAMB counts its steps by parameter group: `group <number>|step`.
    """
    names: dict[Tensor, str] = {parameter: name for name, parameter in student.named_parameters()}
    counts = {
        f"{GROUP}{number}|step": torch.as_tensor(group["step"]).clone()
        for number, group in enumerate(optimizer.param_groups)
        if "step" in group
    }
    return counts | {
        f"{names[parameter]}|{slot}": whole(value.detach())
        for parameter, slots in optimizer.state.items()
        for slot, value in slots.items()
        if isinstance(value, Tensor)  # Muon notes beside them which weights it takes
    }


def load_optimizer(
    student: nn.Module, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]
) -> None:
    """Put back what `optimizer_tensors` returned."""
    parameters = dict(student.named_parameters())
    for key, value in tensors.items():
        name, slot = key.rsplit("|", 1)
        if name.startswith(GROUP):
            optimizer.param_groups[int(name.removeprefix(GROUP))][slot] = value.clone()
            continue
        parameter = parameters[name]
        on = parameter.device if value.ndim else value.device  # step counters stay on the CPU
        optimizer.state[parameter][slot] = like(value, parameter) if value.ndim else value.to(on)
