"""A seeded encoder of three blocks, and pictures for it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from picture_zoo import colours
from test_student import shaken, small_vit
from transformers import RadioConfig, RadioModel

from radio.encoder.card import model_card
from radio.encoder.folder import write_folder
from radio.encoder.layout import clean_backbone
from radio.encoder.weights import EncoderWeights, TeacherHeads
from student.adaptors import MlpAdaptor
from student.model import TeacherDims

DIMS = {"words": TeacherDims(12, 8), "parts": TeacherDims(6, 7), "edges": TeacherDims(None, 10)}
SIZES_PX = [(128, 128), (64, 64), (96, 64), (48, 112), (176, 144), (160, 160)]  # table is 128


def head(width: int, out: int, depth: int = 2, seed: int = 0) -> dict[str, torch.Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return shaken(MlpAdaptor(width, out, 24, depth), seed).state_dict()


def small_weights(layer_scale: float | None = None) -> EncoderWeights:
    """Return a seeded encoder of three blocks; rows and heads out of order on purpose."""
    teachers = {
        "words": TeacherHeads(2, {"summary": head(96, 12), "features": head(96, 8, 4, 1)}),
        "parts": TeacherHeads(0, {"summary": head(96, 6, 2, 2), "features": head(96, 7, 2, 3)}),
        "edges": TeacherHeads(None, {"features": head(96, 10, 2, 4)}),
    }
    backbone = clean_backbone(small_vit(layer_scale=layer_scale).state_dict())
    return EncoderWeights(backbone, 3, 3, (0, 2), teachers, image_size=64)


def write_small(folder: Path, **changes: Any) -> Path:
    weights = replace(small_weights(), **changes)
    write_folder(weights, model_card(weights), folder)
    return folder


def photographs(count: int, height: int = 64, width: int = 48) -> torch.Tensor:
    pictures = [np.asarray(colours(width, height, seed)) for seed in range(count)]
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous()


def seeded_radio_model(**options: Any) -> RadioModel:
    settings = {
        "hidden_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 3,
        "max_img_size": 128,
        "num_cls_tokens": 3,
        "num_registers": 5,
        "summary_idxs": [2, 0],
        "norm_mean": [0.4, 0.5, 0.6],
        "norm_std": [0.2, 0.3, 0.4],
        **options,
    }
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = RadioModel(RadioConfig(**settings))
    assert isinstance(model, RadioModel)
    shaken(model)
    return model


def change_config(folder: Path, changes: Mapping[str, object], drop: str | None = None) -> None:
    config = json.loads((folder / "config.json").read_text())
    config.update(changes)
    config.pop(drop or "", None)
    (folder / "config.json").write_text(json.dumps(config))
