"""One step of the algorithm: predict every teacher, compare, weigh, descend.

AM-RADIO (2312.06709, 3) with PHI-S targets (2410.01680): the student's adaptors predict every
teacher's summary and standardized features; the loss of a teacher is the mean over views of
1 - cos(summary) plus MSE(features), weighted and summed over teachers.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from radio.config import Config
from radio.data.plan import Plan, seed_for
from radio.targets.grid import to_grid
from radio.targets.stream import PartitionBatch, StepBatch
from radio.training.losses import FEATURE_LOSSES, SUMMARY_LOSSES, weighted_mean
from radio.training.optim import learning_rate, set_learning_rate
from student.model import Student, StudentOutput


def training_step(
    student: Student,
    optimizer: torch.optim.Optimizer,
    batch: StepBatch,
    config: Config,
    plan: Plan,
    device: torch.device,
) -> dict[str, Tensor]:
    """Take one step of the algorithm and return the unweighted losses, still on the device."""
    number, stage_step = plan.locate(batch.step)
    stage = config.stages[number]
    torch.manual_seed(seed_for(config.seed, "step", batch.step))
    base = config.optimizer.lr if stage.lr is None else stage.lr
    rate = learning_rate(base, config.optimizer.warmup_steps, stage_step, stage.steps)
    set_learning_rate(optimizer, rate)
    # PHI-S trains the heads alone before a stage's targets reach the body (2410.01680, A.7).
    student.backbone.requires_grad_(stage_step >= stage.frozen_trunk_steps)
    half = config.student.precision == "bf16"
    with torch.autocast(device.type, torch.bfloat16, enabled=half):
        losses = step_losses(student, batch, config, device)
    torch.autograd.backward(total_loss(losses, config))
    if config.optimizer.clip_norm is not None:
        torch.nn.utils.clip_grad_norm_(student.parameters(), config.optimizer.clip_norm)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return {name: loss.detach() for name, loss in losses.items()}


def step_losses(
    student: Student, batch: StepBatch, config: Config, device: torch.device
) -> dict[str, Tensor]:
    """Return the step's unweighted losses, `<teacher>/summary` and `<teacher>/features`.

    A teacher's loss is one weighted mean over the views of all partitions, each view weighted
    by the square root of its valid positions. Nothing here waits for the device.
    """
    collected: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for partition in batch.partitions:
        outputs = student(partition.images.to(device), merge_per_block=partition.merge_per_block)
        for name, per_view in partition_losses(partition, outputs, config, device).items():
            collected.setdefault(name, []).append(per_view)
    return {
        name: weighted_mean(
            torch.cat([losses for losses, _ in parts]), torch.cat([valid for _, valid in parts])
        )
        for name, parts in collected.items()
    }


def partition_losses(
    partition: PartitionBatch,
    outputs: Mapping[str, StudentOutput],
    config: Config,
    device: torch.device,
) -> dict[str, tuple[Tensor, Tensor]]:
    """Return (loss [b], number of valid positions [b]) by loss name for one partition.

    The student projects first and is then brought to the target's grid: the other order gives
    other gradients (lineage: cosine 0.79 between them).
    """
    summary_loss = SUMMARY_LOSSES[config.losses.summary]
    feature_loss = FEATURE_LOSSES[config.losses.feature]
    losses: dict[str, tuple[Tensor, Tensor]] = {}
    for name, target in partition.targets.items():
        output, weights = outputs[name], config.teachers[name]
        valid = target.valid.to(device)
        if weights.feature_weight:
            features = target.features.to(device)
            predicted = to_grid(output.features.float(), (valid.shape[-2], valid.shape[-1]))
            per_view = feature_loss(predicted, features, valid)
            losses[f"{name}/features"] = per_view, valid.flatten(1).sum(1)
        if weights.summary_weight and output.summary is not None and target.summary is not None:
            per_view = summary_loss(output.summary.float(), target.summary.to(device))
            losses[f"{name}/summary"] = per_view, torch.ones_like(per_view)
    return losses


def total_loss(losses: Mapping[str, Tensor], config: Config) -> Tensor:
    """Return the weighted sum over teachers that is descended."""
    weights = {
        f"{name}/{what}": weight
        for name, teacher in config.teachers.items()
        for what, weight in (
            ("summary", teacher.summary_weight),
            ("features", teacher.feature_weight),
        )
    }
    return torch.stack([weights[name] * loss for name, loss in losses.items()]).sum()
