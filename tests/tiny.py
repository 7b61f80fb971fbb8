"""A run small enough for tests: generated pictures, fake teachers, a ViT-Ti of four blocks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from radio.config import (
    CheckpointConfig,
    Config,
    DataConfig,
    EvaluationConfig,
    FitConfig,
    OptimizerConfig,
    PartitionConfig,
    StageConfig,
    StudentConfig,
    TeacherCard,
    TeacherConfig,
)
from student.vit import SIZES

# What a run does with twelve blocks it does with four, in a third of the time.
SIZES["four_blocks"] = replace(SIZES["tiny"], depth=4)


def write_pictures(folder: Path, count: int, seed: int = 0, side: int = 72) -> Path:
    """Write smooth coloured pictures `p000.png`... and return the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    for number in range(count):
        coarse = rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)
        picture = Image.fromarray(coarse).resize(
            (side, side + number % 3), Image.Resampling.BICUBIC
        )
        picture.save(folder / f"p{number:03d}.png")
    return folder


def fake_teacher(
    summary_dim: int | None, feature_dim: int, stride: int = 16, native_size: int = 64
) -> TeacherConfig:
    """Return a seeded projection teacher of any dims."""
    modes = ["native", "match", "mosaic"]
    options = {
        "summary_dim": summary_dim,
        "feature_dim": feature_dim,
        "stride": stride,
        "native_size": native_size,
        "view_modes": modes,
    }
    card = TeacherCard(summary_dim, feature_dim, stride, native_size, modes, 0.1, 0.1, "none", "-")
    return TeacherConfig("fake", options, card=card)


def tiny_config(root: Path, steps: int = 6, pictures: int = 24) -> Config:
    """Return a two-partition run with three fake teachers, one of them on mosaics."""
    train, val = root / "train", root / "val"
    if not train.exists():
        write_pictures(train, pictures)
        write_pictures(val, 4, seed=1)
    boundaries = fake_teacher(None, 10)
    boundaries.summary_weight = 0.0
    return Config(
        out=str(root / "run"),
        data=DataConfig(str(train), str(val), micro_batch=3),
        student=StudentConfig(size="four_blocks", image_size=64, adaptor_hidden=32),
        teachers={
            "words": fake_teacher(12, 8, 32),
            "parts": fake_teacher(6, 7, 14),
            "edges": boundaries,
        },
        fit=FitConfig(steps=3),
        optimizer=OptimizerConfig(lr=1e-3, warmup_steps=1),
        checkpoint=CheckpointConfig(every_steps=2, keep=3),
        evaluation=EvaluationConfig(views=4),
        stages=[
            StageConfig(
                steps,
                {
                    "low": PartitionConfig(
                        32, 5, {"words": "native", "parts": "match", "edges": "mosaic"}
                    ),
                    "high": PartitionConfig(
                        64, 2, {"words": "native", "parts": "match", "edges": "native"}, 2
                    ),
                },
            )
        ],
    )
