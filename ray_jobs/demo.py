"""`radio demo`: photographs in, four teachers on Ray, one fused encoder out.

Only strings the other verbs together: photographs -> train -> fuse -> transformers -> encode.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from radio.config import Config, load
from radio.data.photographs import write_photographs
from radio.encoder.encoder import load as load_encoder
from radio.encoder.fuse import fuse
from radio.errors import RadioError
from radio.extraction.encode import encode
from radio.training.student_run import RunResult
from ray_jobs.train import train

log = logging.getLogger("radio.demo")


@dataclass(frozen=True)
class DemoResult:
    """What the demo made: the run's result, the encoder's folder, and the features' folder."""

    run: RunResult
    encoder: Path
    features: Path
    parameters: int


def demo_config(overrides: Sequence[str] = ()) -> Config:
    """Return the demo's configuration; its pictures lie in its own out folder."""
    config = load(["experiment=demo", *overrides])
    data = Path(config.out) / "data"
    given = {override.split("=", 1)[0].lstrip("+") for override in overrides}
    if "data.train" not in given:
        config.data.train = str(data / "train-000000.tar")
        config.data.val = str(data / "val-000000.tar")
    return config


def demo(config: Config) -> DemoResult:
    """Run the whole line and return where everything is."""
    data = Path(config.out) / "data"
    if Path(config.data.train).parent == data and not Path(config.data.train).exists():
        write_photographs(data)
        log.info("photographs of scikit-image and scikit-learn became shards in %s", data)
    run = train(config)
    out = Path(config.out) / "encoder"
    fuse(run.out, out)
    parameters = load_natively(out)
    encoder = load_encoder(out)
    features = Path(config.out) / "features"
    names = ("summary", "features", *(n for n in encoder.feature_names if n.endswith(":summary")))
    size = config.stages[-1].partitions[list(config.stages[-1].partitions)[-1]].image_size
    if config.data.val is not None:
        encode([config.data.val], features, encoder, features=names, size=size, overwrite=True)
    return DemoResult(run, out, features, parameters)


def load_natively(encoder: Path) -> int:
    """Load the folder by transformers alone, without remote code, and return its parameters.

    Raises:
        RadioError: transformers found missing or unexpected weights.
    """
    from transformers import AutoModel  # slow import
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    model, info = AutoModel.from_pretrained(encoder, output_loading_info=True)
    strange = {key: value for key, value in info.items() if value}
    if strange:
        raise RadioError(f"transformers does not load {encoder} cleanly: {strange}")
    return sum(parameter.numel() for parameter in model.parameters())
