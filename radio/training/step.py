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

from radio.config import Config, StageConfig
from radio.data.plan import Plan, seed_for
from radio.data.ranks import Ranks
from radio.targets.grid import Grid, to_grid
from radio.targets.stream import PartitionBatch, StepBatch, Target
from radio.training.balance import Balance
from radio.training.equivariance import MESA, mesa_loss, shift_equivariant_loss
from radio.training.learner import Learner
from radio.training.losses import FEATURE_LOSSES, RIGHT_ANGLE, SUMMARY_LOSSES, weighted_sum
from radio.training.optim import learning_rate, set_learning_rate
from radio.training.parallel import summed
from radio.training.predictor import Prediction
from radio.training.regularise import damp
from student.model import Student, StudentOutput
from student.vit import VitOutput

ALONE = Ranks()
PerView = dict[str, tuple[Tensor, Tensor]]  # loss [b] and number of valid positions [b], by name


def training_step(
    learner: Learner, batch: StepBatch, config: Config, plan: Plan, device: torch.device
) -> dict[str, Tensor]:
    """Take one step of the algorithm and return the unweighted losses, still on the device.

    Recipe: frozen trunk at a stage's start; PHI-S (2410.01680) section A.7;
    stages[].frozen_trunk_steps;
    tests/test_stages.py::test_only_the_adaptors_move_while_the_trunk_is_frozen.
    """
    student, optimizer = learner.student, learner.optimizer
    number, stage_step = plan.locate(batch.step)
    stage = config.stages[number]
    base = config.optimizer.lr if stage.lr is None else stage.lr
    rate = learning_rate(base, config.optimizer.warmup_steps, stage_step, stage.steps)
    set_learning_rate(optimizer, rate)
    # PHI-S trains the heads alone before a stage's targets reach the body (2410.01680, A.7).
    student.backbone.requires_grad_(stage_step >= stage.frozen_trunk_steps)
    half = config.student.precision == "bf16"
    with noisy_weights(student, batch.step, config, device):
        with torch.autocast(device.type, torch.bfloat16, enabled=half):
            parts = [
                partition_losses(partition, said, learner, config)
                for partition, said in zip(
                    batch.partitions, learner.predict(batch, device), strict=True
                )
            ]
        losses = averaged(parts, loss_names(config, stage), learner.ranks)
        total = total_loss(parts, losses, learner.balance, batch.step, config)
        torch.autograd.backward(total * learner.ranks.size)  # processes average their gradients
    if config.optimizer.clip_norm is not None:
        torch.nn.utils.clip_grad_norm_(student.parameters(), config.optimizer.clip_norm)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    if learner.ema is not None:
        learner.ema.update(student, batch.step)
    return {name: loss.detach() for name, loss in losses.items()}


def partition_losses(
    partition: PartitionBatch, said: Prediction, learner: Learner, config: Config
) -> PerView:
    """Return (loss [b], number of valid positions [b]) by loss name for one partition.

    The names are `<teacher>/summary` and `<teacher>/features`. The student projects first and is
    then brought to the target's grid: the other order gives other gradients (lineage: cosine 0.79
    between them). Nothing here waits for the device.
    """
    summary_loss = SUMMARY_LOSSES[config.losses.summary]
    losses: PerView = {}
    for name, target in partition.targets.items():
        output, weights = said.outputs[name], config.teachers[name]
        if weights.feature_weight:
            losses[f"{name}/features"] = feature_losses(output, target, said.grid, config)
        if weights.summary_weight and output.summary is not None and target.summary is not None:
            spread = learner.dispersions.get(name, RIGHT_ANGLE)
            summary = output.summary.float()
            per_view = summary_loss(summary, target.summary.to(summary.device), spread)
            losses[f"{name}/summary"] = per_view, torch.ones_like(per_view)
    if partition.twin_images is not None:
        losses[MESA] = average_losses(said.tokens, partition, learner)
    return losses


def feature_losses(
    output: StudentOutput, target: Target, patches: Grid, config: Config
) -> tuple[Tensor, Tensor]:
    """Return (loss [b], number of positions [b]) of a teacher's features.

    Where the teacher saw another part of the crop, only what is common is compared (C-RADIOv4).
    """
    feature_loss = FEATURE_LOSSES[config.losses.feature]
    device = output.features.device
    features, valid = target.features.to(device), target.valid.to(device)
    predicted = to_grid(output.features.float(), (valid.shape[-2], valid.shape[-1]))
    if target.shift is None:
        return feature_loss(predicted, features, valid), valid.flatten(1).sum(1)
    return shift_equivariant_loss(predicted, features, valid, target.shift, patches, feature_loss)


def average_losses(
    tokens: VitOutput, partition: PartitionBatch, learner: Learner
) -> tuple[Tensor, Tensor]:
    """Return the student's (loss [b], positions [b]) against its own average (C-RADIOv4, MESA)."""
    assert partition.twin_images is not None and partition.twin_shift is not None
    images = partition.twin_images.to(tokens.features.device)
    with torch.no_grad():
        average = learner.result.backbone(images, partition.merge_per_block, partition.window)
    return mesa_loss(tokens.features, average.features, partition.twin_shift)


def averaged(
    parts: Sequence[PerView], names: Sequence[str], ranks: Ranks = ALONE
) -> dict[str, Tensor]:
    """Return each loss over the views of all partitions and processes.

    A loss is one weighted mean, each view weighted by the square root of its valid positions. Its
    gradient is that of this process's views.
    """
    found = [name for name in names if ranks.size > 1 or any(name in part for part in parts)]
    sums = {name: [weighted_sum(*part[name]) for part in parts if name in part] for name in found}
    # Processes add up one table, so all must have it on the same kind of device.
    nothing = torch.zeros(
        2, device=next(loss.device for part in parts for loss, _ in part.values())
    )
    rows = [torch.stack(sums[name]).sum(0) if sums[name] else nothing for name in found]
    local = torch.stack(rows)
    whole = summed(local.detach().clone(), ranks)
    weight = whole[:, 1].clamp_min(torch.finfo(whole.dtype).tiny)
    mine, value = local[:, 0] / weight, whole[:, 0] / weight
    losses = mine + (value - mine.detach()) if ranks.size > 1 else mine
    return dict(zip(found, losses.unbind(), strict=True))


def loss_names(config: Config, stage: StageConfig) -> list[str]:
    """Return the names of a stage's losses, the same in every process."""
    names = []
    for name, teacher in config.teachers.items():
        modes = {part.views[name] for part in stage.partitions.values() if name in part.views}
        if modes and teacher.feature_weight:
            names.append(f"{name}/features")
        has_summary = teacher.card.summary_dim is not None and modes - {"mosaic", "tiled"}
        if has_summary and teacher.summary_weight:
            names.append(f"{name}/summary")
    return names + ([MESA] if config.losses.mesa_weight else [])


def total_loss(
    parts: Sequence[PerView],
    losses: Mapping[str, Tensor],
    balance: Balance,
    step: int,
    config: Config,
) -> Float[Tensor, ""]:
    """Return the sum over teachers that is descended, weighted by the user and the balance."""
    generator = torch.Generator().manual_seed(seed_for(config.seed, "balance", step))
    weights = loss_weights(config)
    if balance.per_view:
        parts = [_balanced_views(part, weights, balance, generator) for part in parts]
        losses = averaged(parts, list(losses))
    weighted = {name: weights[name] * loss for name, loss in losses.items()}
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
