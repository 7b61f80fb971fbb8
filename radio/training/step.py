"""One step of the algorithm: predict every teacher, compare, weigh, descend.

AM-RADIO (2312.06709, 3) with PHI-S targets (2410.01680): the student's adaptors predict every
teacher's summary and standardized features; the loss of a teacher is the mean over views of
1 - cos(summary) plus MSE(features), weighted and summed over teachers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from jaxtyping import Float
from torch import Tensor

from radio.config import Config
from radio.data.plan import Plan, seed_for
from radio.targets.grid import to_grid
from radio.targets.stream import PartitionBatch, StepBatch, Target
from radio.training.balance import Balance
from radio.training.equivariance import mesa_loss, shift_equivariant_loss
from radio.training.learner import Learner
from radio.training.losses import FEATURE_LOSSES, RIGHT_ANGLE, SUMMARY_LOSSES, weighted_mean
from radio.training.optim import learning_rate, set_learning_rate
from radio.training.regularise import damp
from student.model import Student, StudentOutput
from student.vit import VitOutput

MESA = "average/mesa"  # the loss that is no teacher's
PerView = dict[str, tuple[Tensor, Tensor]]  # loss [b] and number of valid positions [b], by name


def training_step(
    learner: Learner, batch: StepBatch, config: Config, plan: Plan, device: torch.device
) -> dict[str, Tensor]:
    """Take one step of the algorithm and return the unweighted losses, still on the device."""
    student, optimizer = learner.student, learner.optimizer
    number, stage_step = plan.locate(batch.step)
    stage = config.stages[number]
    torch.manual_seed(seed_for(config.seed, "step", batch.step))
    base = config.optimizer.lr if stage.lr is None else stage.lr
    rate = learning_rate(base, config.optimizer.warmup_steps, stage_step, stage.steps)
    set_learning_rate(optimizer, rate)
    # PHI-S trains the heads alone before a stage's targets reach the body (2410.01680, A.7).
    student.backbone.requires_grad_(stage_step >= stage.frozen_trunk_steps)
    half = config.student.precision == "bf16"
    with noisy_weights(student, batch.step, config, device):
        with torch.autocast(device.type, torch.bfloat16, enabled=half):
            parts = [
                partition_losses(partition, learner, config, device)
                for partition in batch.partitions
            ]
        total = total_loss(parts, learner.balance, batch.step, config)
        torch.autograd.backward(total)
    if config.optimizer.clip_norm is not None:
        torch.nn.utils.clip_grad_norm_(student.parameters(), config.optimizer.clip_norm)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    if learner.ema is not None:
        learner.ema.update(student, batch.step)
    return {name: loss.detach() for name, loss in averaged(parts).items()}


def partition_losses(
    partition: PartitionBatch, learner: Learner, config: Config, device: torch.device
) -> PerView:
    """Return (loss [b], number of valid positions [b]) by loss name for one partition.

    The names are `<teacher>/summary` and `<teacher>/features`. The student projects first and is
    then brought to the target's grid: the other order gives other gradients (lineage: cosine 0.79
    between them). Nothing here waits for the device.
    """
    images = partition.images.to(device)
    tokens = learner.student.backbone(images, partition.merge_per_block, partition.window)
    outputs = learner.student.predict(tokens)
    summary_loss = SUMMARY_LOSSES[config.losses.summary]
    losses: PerView = {}
    for name, target in partition.targets.items():
        output, weights = outputs[name], config.teachers[name]
        if weights.feature_weight:
            losses[f"{name}/features"] = feature_losses(output, target, images, config)
        if weights.summary_weight and output.summary is not None and target.summary is not None:
            spread = learner.dispersions.get(name, RIGHT_ANGLE)
            per_view = summary_loss(output.summary.float(), target.summary.to(device), spread)
            losses[f"{name}/summary"] = per_view, torch.ones_like(per_view)
    if partition.twin_images is not None:
        losses[MESA] = average_losses(tokens, partition, learner, device)
    return losses


def feature_losses(
    output: StudentOutput, target: Target, images: Tensor, config: Config
) -> tuple[Tensor, Tensor]:
    """Return (loss [b], number of positions [b]) of a teacher's features.

    Where the teacher saw another part of the crop, only what is common is compared (C-RADIOv4).
    """
    feature_loss = FEATURE_LOSSES[config.losses.feature]
    features, valid = target.features.to(images.device), target.valid.to(images.device)
    predicted = to_grid(output.features.float(), (valid.shape[-2], valid.shape[-1]))
    if target.shift is None:
        return feature_loss(predicted, features, valid), valid.flatten(1).sum(1)
    patch = config.student.patch_size
    patches = images.shape[-2] // patch, images.shape[-1] // patch
    return shift_equivariant_loss(predicted, features, valid, target.shift, patches, feature_loss)


def average_losses(
    tokens: VitOutput, partition: PartitionBatch, learner: Learner, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return the student's (loss [b], positions [b]) against its own average (C-RADIOv4, MESA)."""
    assert partition.twin_images is not None and partition.twin_shift is not None
    images = partition.twin_images.to(device)
    with torch.no_grad():
        average = learner.result.backbone(images, partition.merge_per_block, partition.window)
    return mesa_loss(tokens.features, average.features, partition.twin_shift)


def averaged(parts: Sequence[PerView]) -> dict[str, Tensor]:
    """Return each loss over the views of all partitions.

    A loss is one weighted mean, each view weighted by the square root of its valid positions.
    """
    names = dict.fromkeys(name for part in parts for name in part)
    return {
        name: weighted_mean(
            torch.cat([part[name][0] for part in parts if name in part]),
            torch.cat([part[name][1] for part in parts if name in part]),
        )
        for name in names
    }


def total_loss(
    parts: Sequence[PerView], balance: Balance, step: int, config: Config
) -> Float[Tensor, ""]:
    """Return the sum over teachers that is descended, weighted by the user and the balance."""
    generator = torch.Generator().manual_seed(seed_for(config.seed, "balance", step))
    weights = loss_weights(config)
    if balance.per_view:
        parts = [_balanced_views(part, weights, balance, generator) for part in parts]
    weighted = {name: weights[name] * loss for name, loss in averaged(parts).items()}
    if not balance.per_view:
        factors = balance.weights(_of_teachers(weighted), generator)
        weighted |= {name: factor * weighted[name] for name, factor in factors.items()}
    return torch.stack(list(weighted.values())).sum()


def _balanced_views(
    part: PerView, weights: Mapping[str, float], balance: Balance, generator: torch.Generator
) -> PerView:
    weighted = {name: weights[name] * loss for name, (loss, _) in part.items()}
    factors = balance.weights(_of_teachers(weighted), generator)
    return part | {
        name: (factor * part[name][0], part[name][1]) for name, factor in factors.items()
    }


def _of_teachers(losses: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: loss for name, loss in losses.items() if name != MESA}


def loss_weights(config: Config) -> dict[str, float]:
    """Return the user's weight of every loss by its name."""
    return {MESA: config.losses.mesa_weight} | {
        f"{name}/{what}": weight
        for name, teacher in config.teachers.items()
        for what, weight in (
            ("summary", teacher.summary_weight),
            ("features", teacher.feature_weight),
        )
    }


def noisy_weights(
    student: Student, step: int, config: Config, device: torch.device
) -> AbstractContextManager[None]:
    """Return the block in which the backbone's weights carry the step's noise, if any (DAMP)."""
    if not config.student.damp:
        return nullcontext()
    generator = torch.Generator(device).manual_seed(seed_for(config.seed, "damp", step))
    return damp(student.backbone, config.student.damp, generator)
