"""What an adaptor must become when its teacher's standardizer is fitted again."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.utils import parametrize

from radio.targets.fold import folded
from radio.targets.standardize import Standardizer
from radio.training.parallel import like, whole


@torch.no_grad()
def refit_adaptor(
    last: nn.Linear,
    before: Standardizer,
    after: Standardizer,
    optimizer: torch.optim.Optimizer,
) -> None:
    """Rewrite an adaptor's last Linear, so that what it says in the teacher's space stays.

    With y' = W1 (y - mu1) before and y'' = W2 (y - mu2) after, y'' = W2 W1^-1 y' + W2 (mu1 - mu2).
    The optimizer's moments of the two parameters are of another space and are dropped.

    Recipe: standardizers fitted again for a stage; PHI-S (2410.01680) section A.7; stages[].refit;
    tests/test_stages.py::test_a_refit_changes_no_prediction_in_the_teachers_space.
    """
    matrix = after.matrix @ before.inverse
    shift = after.matrix @ (before.mean - after.mean)
    weight, bias = folded(whole(last.weight), whole(last.bias), matrix, shift)
    if parametrize.is_parametrized(last, "weight"):
        last.weight = weight  # through the right inverse of its parametrisation
    else:
        last.weight.copy_(like(weight, last.weight))
    last.bias.copy_(like(bias, last.bias))
    for parameter in last.parameters():
        optimizer.state.pop(parameter, None)
