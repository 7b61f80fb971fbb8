"""The encoder folder on disk: reading any that we know, writing ours whole or not at all.

config.json                transformers' RadioConfig, our `adaptors` block, vLLM's fields
model.safetensors          the backbone in NVIDIA's names, LayerScale folded
adaptors.safetensors       <teacher>.<summary|features>.<key>
preprocessor_config.json   README.md   SHA256SUMS

On a timm trunk config.json is transformers' TimmWrapperConfig, which says how to prepare pictures
too; model.safetensors is in timm's names, and adaptors.safetensors also has `backbone.query`.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from radio.encoder.layout import from_disk
from radio.encoder.published import read_pth, read_remote
from radio.encoder.weights import (
    HEADS,
    EncoderWeights,
    TeacherHeads,
    TrunkWeights,
    Weights,
    filled_trunk,
)
from radio.errors import RadioError
from radio.files import save_tensors
from radio.training.checkpoint import SUMS, write_sums
from student.radio_layout import SUMMARY_ROWS, State, below, to_disk
from student.timm_trunk import from_timm, timm_config, timm_state
from student.windows import NUM_GLOBAL

CONFIG, MODEL, ADAPTORS = "config.json", "model.safetensors", "adaptors.safetensors"
INDEX = f"{MODEL}.index.json"  # of a model in several files
PREPROCESSOR = "preprocessor_config.json"
FILES = (CONFIG, MODEL, ADAPTORS, PREPROCESSOR, "README.md", SUMS)
NEEDED = ("num_attention_heads", "num_cls_tokens", "num_hidden_layers", "image_size")
TRUNK_NEEDED = ("architecture", "patch_size", "num_cls_tokens", "pretrained_cfg")
QUERY = "backbone.query"  # of a trunk's pooling, which AutoModel does not know
# What RadioConfig leaves open and our backbone does not.
FIXED = {"hidden_act": "gelu", "layer_norm_eps": 1e-6, "num_channels": 3, "use_swiglu_ffn": False}
DIM_OF = {"summary": "summary_dim", "features": "feature_dim"}  # a head's channels in `adaptors`
AGAIN = "make the folder anew with `radio fuse`, or download it again"
VLLM_MODELS = {384: "small", 768: "base", 1024: "large", 1280: "huge"}


def read_weights(path: Path) -> Weights:
    """Read an encoder folder of ours, NVIDIA's folder (remote code or native), or a `.pth.tar`.

    Raises:
        RadioError: none of these; the message lists what was expected and what is there.
    """
    if path.is_file():
        return read_pth(path)
    if not path.is_dir():
        raise RadioError(f"{path} does not exist; expected an encoder folder or a .pth.tar file")
    files = _model_files(path)
    if not (path / CONFIG).exists() or not files:
        found = ", ".join(sorted(item.name for item in path.iterdir())[:8]) or "nothing"
        raise RadioError(
            f"{path} is no encoder folder: expected {CONFIG} and {MODEL} (from `radio fuse RUN "
            f"FOLDER`, or NVIDIA's), found {found}"
        )
    tensors = {key: value for file in files for key, value in _load(file).items()}
    config = _read_config(path / CONFIG)
    if isinstance(config.get("args"), dict):
        return read_remote(tensors, config)
    if config.get("model_type") == "radio":
        return _read_native(path, tensors, config)
    if config.get("model_type") == "timm_wrapper":
        return _read_trunk(path, tensors, config)
    raise RadioError(
        f"{path / CONFIG} has model_type {config.get('model_type')!r}; expected 'radio', "
        "'timm_wrapper', or the `args` of NVIDIA's remote code"
    )


def _model_files(path: Path) -> list[Path]:
    if (path / INDEX).exists():  # names files that may be missing
        return [
            path / name for name in sorted(set(_read_config(path / INDEX)["weight_map"].values()))
        ]
    return sorted(path.glob("model*.safetensors"))


def _read_native(path: Path, tensors: State, config: dict[str, Any]) -> EncoderWeights:
    _check_config(path / CONFIG, config)
    adaptors = config.get("adaptors", {})
    states = _load(path / ADAPTORS) if adaptors else {}
    rows = tensors[SUMMARY_ROWS].tolist() if SUMMARY_ROWS in tensors else config["summary_idxs"]
    weights = EncoderWeights(
        from_disk(tensors),
        int(config["num_attention_heads"]),
        int(config["num_cls_tokens"]),
        tuple(rows),
        {name: _heads(path, states, name, dict(block)) for name, block in adaptors.items()},
        align_corners=bool(config.get("cpe_align_corners", False)),
        image_size=int(config["image_size"]),
        origin=config.get("origin", {}),
        num_windowed=config.get("vitdet_num_windowed"),
        num_global=int(config.get("vitdet_num_global", NUM_GLOBAL)),
    )
    if weights.shape.depth != config["num_hidden_layers"]:  # the depth is read off the tensors
        raise RadioError(
            f"{path} holds {weights.shape.depth} blocks but its {CONFIG} says "
            f"{config['num_hidden_layers']}; {AGAIN}"
        )
    return weights


def _read_trunk(path: Path, tensors: State, config: dict[str, Any]) -> TrunkWeights:
    _check_whole(path / CONFIG, config, TRUNK_NEEDED)
    beside, prepared = _load(path / ADAPTORS), config["pretrained_cfg"]
    _check_whole(path / ADAPTORS, beside, (QUERY,))
    _check_whole(path / CONFIG, prepared, ("input_size", "mean", "std"))
    trunk = filled_trunk(
        config["architecture"],
        int(config["patch_size"]),
        int(config["num_cls_tokens"]),
        from_timm(tensors, beside[QUERY], prepared["mean"], prepared["std"]),
    )
    adaptors = config.get("adaptors", {})
    teachers = {name: _heads(path, beside, name, dict(block)) for name, block in adaptors.items()}
    return TrunkWeights(trunk, teachers, int(prepared["input_size"][-1]), config.get("origin", {}))


def _check_whole(path: Path, found: Mapping[str, Any], needed: tuple[str, ...]) -> None:
    missing = [key for key in needed if key not in found]
    if missing:
        raise RadioError(f"{path} lacks {', '.join(missing)}; {AGAIN}")


def _check_config(path: Path, config: dict[str, Any]) -> None:
    _check_whole(path, config, NEEDED)
    for key, value in FIXED.items():
        if config.get(key, value) != value:
            raise RadioError(
                f"{path} has {key} {config[key]!r}; an encoder can only have {value!r}"
            )


def _heads(path: Path, states: State, name: str, block: dict[str, Any]) -> TeacherHeads:
    # Float32 like the backbone, also of a folder that is stored in half precision.
    found = {
        kind: {key: value.float() for key, value in below(states, f"{name}.{kind}.").items()}
        for kind in HEADS
    }
    present = {kind: state for kind, state in found.items() if state}
    for kind, dim in DIM_OF.items():
        if dim in block and kind not in present:
            raise RadioError(f"{path / ADAPTORS} lacks the head {name}:{kind}; {AGAIN}")
    row, left_out = block.pop("cls_row", None), block.pop("left_out", {})
    upsample = int(block.pop("upsample", 1))
    return TeacherHeads(row, present, left_out, block, upsample)


def _load(path: Path) -> State:
    try:
        tensors: State = load_file(path)
    except (OSError, SafetensorError) as error:
        raise RadioError(
            f"{path} is missing or no whole safetensors file ({error}); {AGAIN}"
        ) from error
    return tensors


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text())
    except ValueError as error:  # no JSON, or no text at all
        raise RadioError(f"{path} is no JSON ({error}); {AGAIN}") from error
    if not isinstance(config, dict):
        raise RadioError(f"{path} holds a {type(config).__name__}, expected settings by name")
    return config


def write_folder(weights: Weights, card: str, out: Path, half: bool = False) -> None:
    """Write the folder under a temporary name and rename it; an older encoder is replaced.

    Args:
        half: store float16 instead of float32.

    Raises:
        RadioError: `out` holds files that are no encoder folder's, or a weight is too large for
            float16.
    """
    out = out.resolve()  # a link stays, and "." has a name
    refuse_foreign(out)
    temporary, old = (out.with_name(f".{kind}-{out.name}-{os.getpid()}") for kind in ("tmp", "old"))
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        _write_files(weights, card, temporary, half)
        if out.exists():
            out.rename(old)
        temporary.rename(out)
    finally:
        if old.exists() and not out.exists():  # the new one could not take its place
            old.rename(out)
        for left in (temporary, old):
            shutil.rmtree(left, ignore_errors=True)


def _write_files(weights: Weights, card: str, folder: Path, half: bool) -> None:
    beside: State = {}
    if isinstance(weights, TrunkWeights):
        disk, beside[QUERY] = timm_state(weights.trunk), weights.trunk.query.detach()
        _write_json(folder / CONFIG, trunk_config_of(weights))
    else:
        disk = to_disk(weights.backbone, weights.summary_rows)
        _write_json(folder / CONFIG, config_of(weights))
        _write_json(folder / PREPROCESSOR, preprocessor_of(weights))
    heads = {
        f"{name}.{kind}.{key}": value.float().contiguous().clone()
        for name, teacher in weights.teachers.items()
        for kind, state in teacher.states.items()
        for key, value in state.items()
    }
    for name, tensors in ((MODEL, disk), (ADAPTORS, {**beside, **heads})):
        stored = {key: _halved(key, value) for key, value in tensors.items()} if half else tensors
        save_tensors(stored, folder / name, {"format": "pt"})
    (folder / "README.md").write_text(card)
    write_sums(folder)


def _halved(name: str, tensor: Tensor) -> Tensor:
    stored = tensor.half() if tensor.is_floating_point() else tensor
    if not stored.isfinite().all():
        raise RadioError(f"{name} has values that float16 cannot hold; fuse without --half")
    return stored


def refuse_foreign(out: Path) -> None:
    """Raise RadioError when writing an encoder to `out` would destroy something else."""
    if not out.exists():
        return
    names = sorted(path.name for path in out.iterdir()) if out.is_dir() else [out.name]
    if names and (CONFIG not in names or "adaptors" not in _read_config(out / CONFIG)):
        raise RadioError(f"{out} exists and is no encoder folder; choose another output folder")
    extra = [name for name in names if name not in FILES]
    if extra:
        raise RadioError(
            f"{out} also holds {', '.join(extra[:4])}, which `radio fuse` did not write and would "
            "delete; move it away or choose another output folder"
        )


def config_of(weights: EncoderWeights) -> dict[str, Any]:
    """Return config.json: RadioConfig's fields, our `adaptors` and `origin`, vLLM's fields."""
    shape = weights.shape
    ratio = shape.mlp_hidden / shape.width
    if int(shape.width * ratio) != shape.mlp_hidden:  # RadioModel truncates the product
        ratio = (shape.mlp_hidden + 0.5) / shape.width
    return {
        "architectures": ["RadioModel"],
        "model_type": "radio",
        "dtype": "float32",
        "hidden_size": shape.width,
        "num_hidden_layers": shape.depth,
        "num_attention_heads": shape.heads,
        "mlp_ratio": ratio,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-6,
        "attention_probs_dropout_prob": 0.0,
        "hidden_dropout_prob": 0.0,
        "drop_path_rate": 0.0,
        "use_swiglu_ffn": False,
        "qkv_bias": True,
        "layerscale_value": 1.0,
        "num_channels": 3,
        "patch_size": weights.patch_size,
        "image_size": weights.image_size,
        "max_img_size": weights.table_size,
        "num_cls_tokens": weights.num_cls,
        "num_registers": weights.num_registers,
        "video_temporal_patch_size": None,
        "summary_idxs": list(weights.summary_rows),
        "norm_mean": weights.backbone["input_conditioner.norm_mean"].flatten().tolist(),
        "norm_std": weights.backbone["input_conditioner.norm_std"].flatten().tolist(),
        "initializer_range": 0.02,
        "cpe_align_corners": weights.align_corners,
        **_our_fields(weights),
        "vitdet_num_windowed": weights.num_windowed,
        "vitdet_num_global": weights.num_global,
        **_vllm_fields(weights),
    }


def trunk_config_of(weights: TrunkWeights) -> dict[str, Any]:
    """Return config.json of a timm trunk: TimmWrapperConfig's fields, and what `radio.load` needs.

    transformers' image processor reads `pretrained_cfg`; there is no preprocessor_config.json.
    """
    return {
        **timm_config(weights.trunk, weights.image_size),
        "patch_size": weights.trunk.patch_size,
        "num_cls_tokens": weights.trunk.num_cls,
        **_our_fields(weights),
    }


def _our_fields(weights: Weights) -> dict[str, Any]:
    return {
        "adaptors": {name: _block(teacher) for name, teacher in weights.teachers.items()},
        "origin": weights.origin,
    }


def _block(teacher: TeacherHeads) -> dict[str, Any]:
    dims = {DIM_OF[kind]: teacher.dim(kind) for kind in teacher.states}
    upsample = {"upsample": teacher.upsample} if teacher.upsample > 1 else {}
    left_out = {"left_out": teacher.left_out} if teacher.left_out else {}
    return {**teacher.facts, "cls_row": teacher.cls_row, **dims, **upsample, **left_out}


def _vllm_fields(weights: EncoderWeights) -> dict[str, Any]:
    """Return what vLLM's RADIO tower counts tokens by, where it knows such a ViT."""
    rows = {
        teacher.cls_row: name
        for name, teacher in weights.teachers.items()
        if teacher.cls_row is not None and "summary" in teacher.states
    }
    known = VLLM_MODELS.get(weights.shape.width)
    if known is None or weights.patch_size != 16 or len(rows) != weights.num_cls:
        return {}
    return {
        "model_name": f"vit_{known}_patch16_224",
        "cpe_max_size": weights.table_size,
        "teachers": [{"name": rows[row], "use_summary": True} for row in sorted(rows)],
        "cls_token_per_teacher": True,
        "register_multiple": weights.num_cls + weights.num_registers,
    }


def preprocessor_of(weights: EncoderWeights) -> dict[str, Any]:
    """Return an image processor's settings: pixels in [0, 1], the model normalises by itself."""
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"height": weights.image_size, "width": weights.image_size},
        "resample": 3,
        "do_center_crop": False,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": False,
    }


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")
