"""NVIDIA's published checkpoints: the hub's `.pth.tar` and the folders of their remote code.

A `.pth.tar` is {arch, epoch, state_dict | state_dict_ema, args: Namespace}; a folder holds
config.json with the same `args` as a dict. Upstream: NVlabs/RADIO `hubconf.py`, `hf_model.py`.
"""

from __future__ import annotations

import argparse
import pickle
import re
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from radio.encoder.layout import (
    from_disk,
    from_hub,
    head_problem,
    last_linear,
    materialise_spectral,
)
from radio.encoder.weights import EncoderWeights, TeacherHeads, heads_of_width
from radio.errors import RadioError
from student.radio_layout import SUMMARY_ROWS, State, below

# `ls1` weights of a .pth.tar lie under these; heads under the teacher's name or its number.
HUB_HEADS = {"summary": "_heads.", "features": "_feature_projections."}
REMOTE_HEADS = {"summary": "head_mlp.", "features": "feat_mlp."}
FIRST_FIXED_MAJOR = 3  # RADIO and C-RADIO up to v2.5 were published under aligned corners
PREFERRED_SIZE = 512
# Which blocks attend within windows, by label, where not as usual (NVlabs/RADIO `common.py`).
WINDOWS = {
    r"(?<![ce]-)radio[-_]v2(?!\.[2-9])": {"num_windowed": 5},
    r"c-radio[-_]v2-vlm-h": {"num_global": 8},
}
# The SigLIP2 whose text tower goes with a teacher of type siglip2 (`siglip2_adaptor.py`).
SIGLIP2 = {
    "siglip2-g-384": "google/siglip2-giant-opt-patch16-384",
    "siglip2-so400m": "google/siglip2-so400m-patch16-naflex",
}
# What torch.load raises on other and on broken files.
UNREADABLE = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    LookupError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
    pickle.UnpicklingError,
    struct.error,
)


def read_pth(path: Path) -> EncoderWeights:
    """Read a hub checkpoint; heads that no adaptor can hold are left out with the reason.

    Raises:
        RadioError: a file of something else, or a backbone that is no plain ViT.
    """
    checkpoint = _unpickle(path)
    kind = "state_dict_ema" if "state_dict_ema" in checkpoint else "state_dict"
    args = vars(checkpoint["args"])
    teachers = _teachers(args, path)
    state = {k.removeprefix("module."): v for k, v in checkpoint[kind].items()}
    state = {key: value for key, value in state.items() if isinstance(value, Tensor)}
    if below(state, "_feature_normalizer."):
        raise RadioError(
            f"{path} holds a feature normalizer, which no encoder folder can; load the same model "
            "without it (radio_v2.5-h instead of radio_v2.5-h-norm)"
        )
    backbone = from_hub(state, args)
    heads = {
        teacher["name"]: _hub_heads(state, args, teachers, index)
        for index, teacher in enumerate(teachers)
        if _first_of_name(teachers, index)
    }
    return EncoderWeights(
        backbone,
        heads_of_width(_width(backbone, path)),
        _num_cls(args, heads),
        _hub_summary_rows(args),
        heads,
        align_corners=published_with_aligned_corners(path.name, teachers),
        image_size=PREFERRED_SIZE,
        origin={"file": path.name, "arch": str(args.get("model")), "weights": kind},
        **windows_of(path.name),
    )


def _unpickle(path: Path) -> dict[str, Any]:
    checkpoint: Any
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except UNREADABLE as error:
        raise RadioError(
            f"{path} is no checkpoint of NVIDIA's that can be read safely ({error}); expected "
            "tensors and an argparse.Namespace only"
        ) from error
    has_weights = isinstance(checkpoint, dict) and (
        "state_dict" in checkpoint or "state_dict_ema" in checkpoint
    )
    if not has_weights or not isinstance(checkpoint.get("args"), argparse.Namespace):
        is_dict = isinstance(checkpoint, dict)
        found = sorted(map(str, checkpoint)) if is_dict else type(checkpoint).__name__
        raise RadioError(
            f"{path} is no checkpoint of NVIDIA's: expected state_dict (or state_dict_ema) and "
            f"args, found {found}"
        )
    return dict(checkpoint)


def _teachers(args: Mapping[str, Any], what: object) -> list[dict[str, Any]]:
    teachers: list[dict[str, Any]] | None = args.get("teachers")
    if not teachers:
        raise RadioError(f"{what} is no checkpoint of NVIDIA's: its args name no teachers")
    return teachers


def _hub_heads(
    state: State, args: Mapping[str, Any], teachers: Sequence[Mapping[str, Any]], index: int
) -> TeacherHeads:
    teacher = teachers[index]
    found = {}
    for kind, prefix in HUB_HEADS.items():
        named = below(state, f"{prefix}{teacher['name']}.")
        found[kind] = materialise_spectral(named or below(state, f"{prefix}{index}."))
    row = int(teacher.get("token_slot", index)) if args.get("cls_token_per_teacher", True) else 0
    upsampling = int(teacher.get("fd_upsample_factor") or 1)
    return teacher_heads(found, row, upsampling, _facts(teacher))


def _facts(teacher: Mapping[str, Any]) -> dict[str, Any]:
    """Return what args say of a teacher, so that its text tower can be built (teachers/text.py)."""
    model = str(teacher.get("model"))
    facts = {"kind": str(teacher.get("type")), "options": {"model": model}}
    pretrained = teacher.get("pretrained") or SIGLIP2.get(model)
    return {**facts, "pretrained": pretrained} if pretrained else facts


def teacher_heads(
    found: Mapping[str, State], cls_row: int, upsampling: int, facts: dict[str, Any]
) -> TeacherHeads:
    """Sort a teacher's heads into those that an adaptor can hold and those left out, with why."""
    states: dict[str, State] = {}
    left_out: dict[str, str] = {}
    for kind, state in found.items():
        if not state:
            continue
        problem = head_problem(state) or (kind == "features" and _uneven(state, upsampling))
        if problem:
            left_out[kind] = problem
        else:
            states[kind] = {key: value.float() for key, value in state.items()}
    return TeacherHeads(cls_row, states, left_out, facts, upsampling if "features" in states else 1)


def _uneven(head: State, upsampling: int) -> str | None:
    """Return why a head's (u1 u2 c) outputs cannot be the u x u positions that are said."""
    outputs = len(head[f"{last_linear(head)}.weight"])
    if outputs % upsampling**2:
        return f"its {outputs} outputs are no {upsampling} x {upsampling} positions of each patch"
    return None


def _first_of_name(teachers: Sequence[Mapping[str, Any]], index: int) -> bool:
    """Tell whether no earlier entry names the same teacher (one per partition is usual)."""
    return all(other["name"] != teachers[index]["name"] for other in teachers[:index])


def _num_cls(args: Mapping[str, Any], heads: Mapping[str, TeacherHeads]) -> int:
    """Count the CLS rows; a head that reads beyond them makes more, as in upstream's RADIOModel."""
    if not args.get("cls_token_per_teacher", True):
        return 1
    read = [head.cls_row or 0 for head in heads.values() if "summary" in head.states]
    return max(len({teacher["name"] for teacher in args["teachers"]}), 1 + max(read, default=0))


def _hub_summary_rows(args: Mapping[str, Any]) -> tuple[int, ...]:
    """Return the numbers of each name's first teacher that has a summary (not its token slot)."""
    if not args.get("cls_token_per_teacher", True):
        return (0,)
    first: dict[str, int] = {}
    for index, teacher in enumerate(args["teachers"]):
        if teacher.get("use_summary", True):
            first.setdefault(teacher["name"], index)
    return tuple(sorted(first.values()))


def published_with_aligned_corners(label: str, teachers: Sequence[Mapping[str, Any]]) -> bool:
    """Tell whether a checkpoint was published when eval CPE resized with aligned corners.

    v1 to v2.5 were, in their label. Labels lie, so a SigLIP2 or DINOv3 teacher (v3, v4) overrules
    them; without either the checkpoint is taken for an old one.
    """
    names = {f"{teacher['name']} {teacher.get('type')}" for teacher in teachers}
    if any(re.search(r"siglip2|dino_?v3|sam_?3", name) for name in names):
        return False
    version = re.search(r"radio[-_]?v(\d+)", label.lower())
    return version is None or int(version[1]) < FIRST_FIXED_MAJOR


def windows_of(label: str) -> dict[str, int]:
    """Return a published checkpoint's `num_windowed` or `num_global`, {} for the usual blocks."""
    return next((how for rule, how in WINDOWS.items() if re.search(rule, label.lower())), {})


def read_remote(tensors: State, config: Mapping[str, Any]) -> EncoderWeights:
    """Read a folder made for NVIDIA's remote code: config.json has `args`, `version`, ..."""
    if below(tensors, "radio_model.feature_normalizer."):
        raise RadioError("a feature normalizer has no place in an encoder; load another version")
    args = config["args"]
    teachers = _teachers(args, config.get("version"))
    backbone = from_disk(materialise_spectral(tensors))
    configs: Mapping[str, Any] = config.get("adaptor_configs") or {}
    facts = {teacher["name"]: _facts(teacher) for teacher in reversed(teachers)}  # the first wins
    heads = {n: _remote_heads(tensors, n, how, facts.get(n, {})) for n, how in configs.items()}
    rows = tuple(tensors[SUMMARY_ROWS].tolist()) if SUMMARY_ROWS in tensors else (0,)
    return EncoderWeights(
        backbone,
        heads_of_width(_width(backbone, config.get("version"))),
        _num_cls(args, heads),
        rows,
        heads,
        align_corners=published_with_aligned_corners(str(config.get("version")), teachers),
        image_size=PREFERRED_SIZE,
        origin={"version": str(config.get("version"))},
        **windows_of(str(config.get("version"))),
    )


def _remote_heads(
    tensors: State, name: str, how: Mapping[str, Any], facts: dict[str, Any]
) -> TeacherHeads:
    below_name = below(tensors, f"radio_model.adaptors.{name}.")
    found = {
        kind: materialise_spectral(below(below_name, prefix))
        for kind, prefix in REMOTE_HEADS.items()
    }
    upsampling = int(how["feature"].get("upsample_factor") or 1)
    return teacher_heads(found, int(how["head_idx"]), upsampling, facts)


def _width(backbone: State, what: object) -> int:
    key = "patch_generator.embedder.weight"
    if key not in backbone:
        raise RadioError(f"{what} holds no RADIO backbone: '{key}' is missing")
    return int(backbone[key].shape[0])
