"""The backbone's key names and folds: ours, NVIDIA's on disk, and what transformers reads.

Our backbone is laid out like NVIDIA's, so on disk only a prefix is added: `radio_model.model.` for
the ViT, `radio_model.input_conditioner.` for the normalisation. transformers' RadioModel renames
and splits them by itself. Everything here is a function from state dict to state dict; upstream
are NVlabs/RADIO `hubconf.py`, `hf_model.py` and `enable_spectral_reparam.py`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

State = dict[str, Tensor]

MODEL = "radio_model.model."
CONDITIONER = "radio_model.input_conditioner."
HUB = "base_model."  # of the ViT in a .pth.tar
SUMMARY_ROWS = "radio_model.summary_idxs"

BACKBONE_KEY = re.compile(
    r"input_conditioner\.norm_(mean|std)"
    r"|patch_generator\.(embedder\.weight|pos_embed|cls_token\.token)"
    r"|blocks\.\d+\.(norm1|norm2|attn\.qkv|attn\.proj|mlp\.fc1|mlp\.fc2)\.(weight|bias)"
)
# Never read in a forward over pictures: a left-over of DINOv2-like timm ViTs, and video's patches.
DEAD_KEY = re.compile(r"reg_token|patch_generator\.video_embedder\..*")
LAYER_SCALE_KEY = re.compile(
    r"(blocks\.\d+\.)(?:ls([12])\.(?:gamma|grandma)|layer_scale([12])\.lambda1)"
)
UNSUPPORTED = {
    r"^norm\.": "a final norm",
    r"\.mlp\.norm\.": "a norm inside the MLP (C-RADIO v1)",
    r"^inner\.|\.w12\.|\.w3\.|embedder\.bias": "a DINOv2-like backbone (SwiGLU, patch bias)",
    r"^(patch_embed|levels)\.": "a convolutional backbone (E-RADIO)",
}
SPECTRAL = ".parametrizations.weight."
SPECTRAL_ALPHA = 0.05  # upstream's floor under the learned spectral norm


def to_disk(backbone: Mapping[str, Tensor], summary_rows: Sequence[int]) -> State:
    """Return a backbone's state dict in NVIDIA's names, LayerScale folded, contiguous."""
    disk = {SUMMARY_ROWS: torch.tensor(list(summary_rows), dtype=torch.int64)}
    for key, value in fold_layer_scale(backbone).items():
        prefix = "radio_model." if key.startswith("input_conditioner.") else MODEL
        disk[prefix + key] = value.contiguous().clone()
    return disk


def from_disk(disk: Mapping[str, Tensor]) -> State:
    """Return our backbone's state dict from NVIDIA's names, other prefixes left out."""
    conditioner = {f"input_conditioner.{k}": v for k, v in below(disk, CONDITIONER).items()}
    return clean_backbone({**below(disk, MODEL), **conditioner})


def from_hub(state: Mapping[str, Tensor], args: Mapping[str, Any]) -> State:
    """Return our backbone's state dict from a hub checkpoint's `state_dict` and `args`.

    Spectral weights are materialised with the run's constant: 1e-6, or 1e-12 when it gave options.
    """
    options = args.get("spectral_reparam")
    eps = float(options.get("eps", 1e-12)) if isinstance(options, Mapping) else 1e-6
    conditioner = {k: v for k, v in state.items() if k.startswith("input_conditioner.")}
    return clean_backbone({**materialise_spectral(below(state, HUB), eps), **conditioner})


def below(state: Mapping[str, Tensor], prefix: str) -> State:
    """Return the entries under a prefix, without it.

    The prefix ends in a dot: upstream matches `_heads.1` and so takes `_heads.10` along.
    """
    assert prefix.endswith("."), prefix
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}


def clean_backbone(state: Mapping[str, Tensor]) -> State:
    """Fold and check a backbone's state dict; float32, only the keys that our backbone has.

    Raises:
        ValueError: a weight for which our backbone has no place, named with what it belongs to.
    """
    # Cast before folding: a product of two small factors underflows in float16.
    folded = fold_layer_scale({key: value.float() for key, value in state.items()})
    kept = {key: value for key, value in folded.items() if not DEAD_KEY.fullmatch(key)}
    strange = [key for key in kept if not BACKBONE_KEY.fullmatch(key)]
    if strange:
        known = (what for rule, what in UNSUPPORTED.items() for k in strange if re.search(rule, k))
        raise ValueError(
            f"these weights are not a plain RADIO ViT: they have {next(known, 'unknown parts')} "
            f"('{strange[0]}', {len(strange)} keys); expected blocks of norm1, attn, norm2, mlp "
            "(RADIO v2, v2.5-B/L/H, C-RADIO v2-v4 B/L/H/SO400M)"
        )
    for name in ("norm_mean", "norm_std"):
        key = f"input_conditioner.{name}"
        if key in kept:
            kept[key] = kept[key].reshape(3, 1, 1)
    return kept


def fold_layer_scale(backbone: Mapping[str, Tensor]) -> State:
    """Multiply LayerScale into the Linear before it and drop its keys, which RadioModel lacks.

    NVIDIA's files spell it `grandma`, because transformers rewrites keys that hold `gamma`;
    RadioModel.save_pretrained adds identities called `layer_scale1.lambda1`.

    Recipe: LayerScale folded into the branch before it; ours; student.layer_scale;
    tests/test_layout.py::test_layer_scale_folds_under_each_of_its_names.
    """
    state = dict(backbone)
    for key, value in backbone.items():
        match = LAYER_SCALE_KEY.fullmatch(key)
        if match is None:
            continue
        del state[key]
        branch = "attn.proj" if (match[2] or match[3]) == "1" else "mlp.fc2"
        weight, bias = f"{match[1]}{branch}.weight", f"{match[1]}{branch}.bias"
        scale = value.double()
        state[weight] = (state[weight].double() * scale[:, None]).to(backbone[weight].dtype)
        state[bias] = (state[bias].double() * scale).to(backbone[bias].dtype)
    return state


def materialise_spectral(state: Mapping[str, Tensor], eps: float = 1e-6) -> State:
    """Replace parametrized weights by what they compute; other keys stay as they are.

    Version 2 is W (softplus(s) + 0.05) / sigma, version 1 (no `_sn_version` key) W s / sigma,
    sigma = u^T W v + eps; qkv has one such factor per part, parts without one are as they are.
    """
    plain = {key: value for key, value in state.items() if SPECTRAL not in key}
    owners = [key.split(SPECTRAL)[0] for key in state if key.endswith(f"{SPECTRAL}original")]
    for owner in owners:
        parameters = below(state, f"{owner}{SPECTRAL}")
        plain[f"{owner}.weight"] = _materialised(parameters, eps)
    return plain


def _materialised(parameters: State, eps: float) -> Tensor:
    weight = parameters["original"]
    if any(".parts." in key for key in parameters):
        # Only qkv is cut in parts among the backbones that we can hold.
        factors = {key.split(".parts.")[1]: v for key, v in parameters.items() if ".parts." in key}
        parts = [
            _reweighted(part, below(factors, f"{index}."), eps)
            for index, part in enumerate(weight.chunk(3, dim=0))
        ]
        return torch.cat(parts)
    factors = {key.split(".", 1)[1]: v for key, v in parameters.items() if key[0].isdigit()}
    return _reweighted(weight, factors, eps)


def _reweighted(weight: Tensor, factor: State, eps: float) -> Tensor:
    if "scale" not in factor:  # DAMP's noise leaves no state, and values may go unnormalised
        return weight
    exact = weight.double()
    sigma = factor["_u"].double() @ exact @ factor["_v"].double() + eps
    scale = factor["scale"].double()[:, :1]  # (1, 4) where FSDP wanted it aligned; the first counts
    version = int(factor["_sn_version"]) if "_sn_version" in factor else 1
    if version == 2:
        scale = F.softplus(scale) + SPECTRAL_ALPHA
    elif version != 1:
        raise ValueError(f"spectral reparametrisation of version {version} is unknown; known: 1, 2")
    return (exact * (scale / sigma)).to(weight.dtype)
