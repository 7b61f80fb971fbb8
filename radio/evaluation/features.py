"""What a target says of every picture of a split, kept on disk by weights and data."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from radio.encoder.images import resized
from radio.evaluation.pictures import Split
from radio.evaluation.target import Target
from radio.files import save_tensors, whole
from radio.progress import Report

log = logging.getLogger("radio.evaluation")
VERSION = 1  # raise it when what is extracted from the same weights and pictures changes
BATCH = 32  # pictures per forward
FEATURES = "features"


def cache_folder() -> Path:
    """Return where features are kept: $RADIO_CACHE, or ~/.cache/radio-distill/features."""
    given = os.environ.get("RADIO_CACHE")
    return Path(given) if given else Path.home() / ".cache" / "radio-distill" / "features"


def features_of(
    target: Target,
    split: Split,
    name: str,
    size: int | None = None,
    progress: Report | None = None,
    batch: int = BATCH,
) -> Float[Tensor, "pictures dim *grid"]:
    """Return one output of a target for every picture, float32: [N, D] or maps [N, D, h, w].

    Every picture is squashed to size x size by one antialiased bicubic pass. The result is kept
    as safetensors by target, pictures, output and size, and read memory-mapped.

    Args:
        name: one of `target.names`.
        size: px a side; `target.size_for(name)` if not given.
        progress: told (done, total) pictures, when they are not kept yet.

    Raises:
        RadioError: an output that the target lacks, a size it cannot take, a damaged picture.
    """
    target.check(name)
    side = target.checked_size(size if size is not None else target.size_for(name))
    if not target.is_kept:
        return _extracted(target, split, name, side, progress, batch)
    path = cache_folder() / f"{_key(target, split, name, side)}.safetensors"
    if (kept := _kept(path, len(split))) is not None:
        return kept
    features = _extracted(target, split, name, side, progress, batch)
    path.parent.mkdir(parents=True, exist_ok=True)
    facts = {"target": target.name, "output": name, "size": str(side)}
    with whole(path) as temporary:
        save_tensors({FEATURES: features}, temporary, facts)
    return load_file(path)[FEATURES]


def _key(target: Target, split: Split, name: str, size: int) -> str:
    parts = [VERSION, target.fingerprint, split.fingerprint, name, size, "float32"]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _kept(path: Path, count: int) -> Tensor | None:
    """Return kept features; a broken file is made again, since it is only a copy."""
    if not path.exists():
        return None
    try:
        features = load_file(path)[FEATURES]
    except (SafetensorError, OSError, KeyError) as error:
        log.warning("the features in %s cannot be read (%s) and are made again", path, error)
        return None
    return features if len(features) == count else None


def _extracted(
    target: Target, split: Split, name: str, size: int, progress: Report | None, batch: int
) -> Tensor:
    features: Tensor | None = None  # made when the first batch says its shape
    for start in range(0, len(split), batch):
        stop = min(start + batch, len(split))
        pictures = [resized(split.picture(at), 1, size) for at in range(start, stop)]
        values = target.extract(torch.stack(pictures), (name,))[name]
        if features is None:
            features = torch.empty(len(split), *values.shape[1:])
        features[start:stop] = values
        if progress is not None:
            progress(stop, len(split))
    assert features is not None, "a split has a sample"
    return features
