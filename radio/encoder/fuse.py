"""Fuse a checkpoint into the product: one encoder folder that transformers loads natively.

The adaptors were trained to predict standardized features y'; the inverse y = A y' + mu (PHI-S:
A = phi U H^T, arXiv 2410.01680 eq. 26) is folded into the last Linear of each feature adaptor, so
that the encoder gives the teacher's own space. Summaries are not standardized.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch

from radio.encoder.card import model_card
from radio.encoder.folder import read_weights, refuse_foreign, write_folder
from radio.encoder.layout import clean_backbone, last_linear, materialise_spectral
from radio.encoder.weights import (
    EncoderWeights,
    TeacherHeads,
    TrunkWeights,
    Weights,
    build_backbone,
    build_heads,
    filled_trunk,
)
from radio.files import sha256_of
from radio.targets.fold import folded
from radio.targets.standardize import Standardizer
from radio.training.checkpoint import Checkpoint, find_checkpoint
from student.radio_layout import State, below
from student.vit import SIZES


def fuse(checkpoint: str | Path, out: str | Path, half: bool = False) -> Path:
    """Write the encoder folder of `checkpoint` to `out` and return its path.

    Args:
        checkpoint: a `step-*` folder, a run folder (its newest checkpoint), NVIDIA's `.pth.tar`,
            or a folder that `radio.load` takes.
        out: the folder to write; an encoder folder there is replaced.
        half: store float16, which `radio.load` and transformers widen again.

    Raises:
        RadioError: nothing of that kind there, `out` holds something that is no encoder, or
            float16 cannot hold a weight.
    """
    source, target = Path(checkpoint), Path(out)
    refuse_foreign(target)
    if source.is_file() or (source / "config.json").exists():
        weights = read_weights(source)
    else:
        weights = weights_of(find_checkpoint(source))
    build_backbone(weights)  # strict: a folder that cannot be loaded is not written
    build_heads(weights.teachers)
    write_folder(weights, model_card(weights), target, half)
    return target


def weights_of(checkpoint: Checkpoint) -> Weights:
    """Return a checkpoint's encoder: all that only training needs folded into plain weights."""
    teachers = _teachers_of(checkpoint)
    rows = [teacher.cls_row for teacher in teachers.values() if teacher.cls_row is not None]
    num_cls = max(1, len(rows))
    state = materialise_spectral(below(checkpoint.model, "backbone."))
    student = checkpoint.config.student
    last_partitions = checkpoint.config.stages[-1].partitions.values()
    image_size = max(partition.image_size for partition in last_partitions)
    origin = {
        "step": checkpoint.step,
        "views": checkpoint.views_seen,
        "data": checkpoint.state["data"],
    }
    if student.backbone is not None:
        trunk = filled_trunk(student.backbone, student.patch_size, num_cls, state)
        return TrunkWeights(trunk, teachers, image_size, origin)
    return EncoderWeights(
        clean_backbone(state),
        SIZES[student.size].heads,
        num_cls,
        tuple(range(num_cls)),
        teachers,
        image_size=image_size,
        origin=origin,
        num_windowed=student.num_windowed,
        num_global=student.num_global,
    )


def _teachers_of(checkpoint: Checkpoint) -> dict[str, TeacherHeads]:
    teachers: dict[str, TeacherHeads] = {}
    num_summaries = 0
    for name in checkpoint.state["teachers"]:  # in the order of the student's CLS rows
        states = _heads_of(checkpoint, name)
        row = num_summaries if "summary" in states else None
        num_summaries += row is not None
        left_out = {}
        if name not in checkpoint.standardizers:
            why = f"no stage before step {checkpoint.step} was matched to it"
            states, left_out = {}, dict.fromkeys(states, why)
        upsample = _upsampling(states, checkpoint.standardizers.get(name))
        teachers[name] = TeacherHeads(row, states, left_out, _facts(checkpoint, name), upsample)
    return teachers


def _heads_of(checkpoint: Checkpoint, name: str) -> dict[str, State]:
    heads = materialise_spectral(below(checkpoint.model, f"adaptors.{name}."))
    states = {"features": below(heads, "features.")}
    if name in checkpoint.standardizers:
        states["features"] = fold_standardizer(states["features"], checkpoint.standardizers[name])
    summary = below(heads, "summary.")
    return {"summary": summary, **states} if summary else states


def _upsampling(heads: dict[str, State], standardizer: Standardizer | None) -> int:
    """Return the u of a features' head with (u1 u2 c) outputs; c is the standardizer's."""
    if standardizer is None or "features" not in heads:
        return 1
    features = heads["features"]
    return math.isqrt(len(features[f"{last_linear(features)}.weight"]) // standardizer.num_channels)


def fold_standardizer(head: State, standardizer: Standardizer) -> State:
    """Compose the inverse y = A y' + mu after a head's last Linear, in float64.

    W <- A W, b <- A b + mu; stored float32. An upsampling head's outputs are (u1 u2 c), and each
    of its u x u groups is folded.
    """
    matrix, mean = standardizer.as_linear()
    last = last_linear(head)
    groups = zip(
        head[f"{last}.weight"].split(len(mean)), head[f"{last}.bias"].split(len(mean)), strict=True
    )
    parts = [folded(weight, bias, matrix, mean) for weight, bias in groups]
    weights, biases = zip(*parts, strict=True)
    return {**head, f"{last}.weight": torch.cat(weights), f"{last}.bias": torch.cat(biases)}


def _facts(checkpoint: Checkpoint, name: str) -> dict[str, Any]:
    """Return what the folder says of a teacher; kind to seed also build its text tower.

    `upsampler` is the SHA-256 of what the fingerprint covers beside the teacher, where there is
    such a file.
    """
    facts, teacher = checkpoint.state["teachers"][name], checkpoint.config.teachers[name]
    finer = Path(teacher.upsampler) if teacher.upsampler is not None else None
    return {
        "kind": facts["kind"],
        "options": dict(teacher.options),
        "pretrained": teacher.pretrained,
        "seed": checkpoint.config.seed,
        "fingerprint": facts["fingerprint"],
        **({"upsampler": sha256_of(finer)} if finer is not None and finer.is_file() else {}),
        "weights_licence": teacher.card.weights_licence,
        "source": teacher.card.source,
    }
