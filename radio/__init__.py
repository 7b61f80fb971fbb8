"""radio-distill: agglomerative multi-teacher distillation of vision foundation models.

Public names are imported on first use, so that `import radio` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from radio.config import load as load_config
    from radio.data.mosaic import Mosaic
    from radio.encoder.encoder import Encoder, load
    from radio.encoder.fuse import fuse
    from radio.errors import RadioError
    from radio.evaluation.evaluate import evaluate
    from radio.extraction.encode import encode
    from radio.targets.hadamard import equal_diagonal_rotation, hadamard
    from radio.targets.standardize import (
        GlobalScale,
        HadamardWhitening,
        Identity,
        PcaWhitening,
        PerChannel,
        PhiS,
        Standardizer,
        ZcaWhitening,
    )
    from radio.targets.stream import LocalStream, PartitionBatch, StepBatch, Target
    from radio.training.distill import distill
    from student.token_merging import MergedTokens, merge_tokens, unmerge

_HOMES = {
    "radio.config": ["load_config"],
    "radio.data.mosaic": ["Mosaic"],
    "radio.encoder.encoder": ["Encoder", "load"],
    "radio.encoder.fuse": ["fuse"],
    "radio.errors": ["RadioError"],
    "radio.evaluation.evaluate": ["evaluate"],
    "radio.extraction.encode": ["encode"],
    "radio.targets.hadamard": ["equal_diagonal_rotation", "hadamard"],
    "radio.targets.standardize": [
        "GlobalScale",
        "HadamardWhitening",
        "Identity",
        "PcaWhitening",
        "PerChannel",
        "PhiS",
        "Standardizer",
        "ZcaWhitening",
    ],
    "radio.targets.stream": ["LocalStream", "PartitionBatch", "StepBatch", "Target"],
    "radio.training.distill": ["distill"],
    "student.token_merging": ["MergedTokens", "merge_tokens", "unmerge"],
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}
_RENAMED = {"load_config": "load"}

__all__ = [
    "Encoder",
    "GlobalScale",
    "HadamardWhitening",
    "Identity",
    "LocalStream",
    "MergedTokens",
    "Mosaic",
    "PartitionBatch",
    "PcaWhitening",
    "PerChannel",
    "PhiS",
    "RadioError",
    "Standardizer",
    "StepBatch",
    "Target",
    "ZcaWhitening",
    "distill",
    "encode",
    "equal_diagonal_rotation",
    "evaluate",
    "fuse",
    "hadamard",
    "load",
    "load_config",
    "merge_tokens",
    "unmerge",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'radio' has no attribute '{name}'")
    return getattr(importlib.import_module(_HOME_OF[name]), _RENAMED.get(name, name))


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
