"""Key names and folds: our backbone's, NVIDIA's on disk, and what transformers reads.

Our backbone is laid out like NVIDIA's, so on disk only a prefix is added: `radio_model.model.` for
the ViT, `radio_model.input_conditioner.` for the normalisation. transformers' RadioModel renames
and splits them by itself. Everything here is a function from state dict to state dict; upstream
are NVlabs/RADIO `hubconf.py`, `hf_model.py` and `enable_spectral_reparam.py`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from radio.errors import RadioError

State = dict[str, Tensor]

MODEL = "radio_model.model."
CONDITIONER = "radio_model.input_conditioner."
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
# What an attention head consists of, as timm's blocks and an MLP of version 2 name it.
ATTENTION_HEAD = {
    f"{part}.{kind}"
    for block in ("blocks.0.", "blocks.1.")
    for part in (f"{block}{name}" for name in ("norm1", "norm2", "attn.proj", "mlp.fc1", "mlp.fc2"))
    for kind in ("weight", "bias")
}
ATTENTION_HEAD |= {
    f"blocks.{i}.{key}" for i in (0, 1) for key in ("attn.qkv.weight", "ls1.gamma", "ls2.gamma")
}
ATTENTION_HEAD |= {
    f"mlp.{part}.{kind}" for part in ("fc1", "final.0", "final.2") for kind in ("weight", "bias")
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


def below(state: Mapping[str, Tensor], prefix: str) -> State:
    """Return the entries under a prefix, without it.

    The prefix ends in a dot: upstream matches `_heads.1` and so takes `_heads.10` along.
    """
    assert prefix.endswith("."), prefix
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}


def clean_backbone(state: Mapping[str, Tensor]) -> State:
    """Fold and check a backbone's state dict; float32, only the keys that our backbone has.

    Raises:
        RadioError: a weight for which our backbone has no place, named with what it belongs to.
    """
    # Cast before folding: a product of two small factors underflows in float16.
    folded = fold_layer_scale({key: value.float() for key, value in state.items()})
    kept = {key: value for key, value in folded.items() if not DEAD_KEY.fullmatch(key)}
    strange = [key for key in kept if not BACKBONE_KEY.fullmatch(key)]
    if strange:
        known = (what for rule, what in UNSUPPORTED.items() for k in strange if re.search(rule, k))
        raise RadioError(
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
        raise RadioError(f"spectral reparametrisation of version {version} is unknown; known: 1, 2")
    return (exact * (scale / sigma)).to(weight.dtype)


def last_linear(head: Mapping[str, Tensor]) -> str:
    """Return where a head's last Linear lies: `final.2`, or `mlp.final.2` of an attention head."""
    return "mlp.final.2" if "mlp.final.2.weight" in head else "final.2"


def head_problem(state: Mapping[str, Tensor]) -> str | None:
    """Return why no adaptor can hold a head of NVIDIA's, or None: MLP version 2 and attention."""
    if "mlp.fc1.weight" in state:
        strange = sorted(set(state) ^ ATTENTION_HEAD)
        return f"it is an attention head of another layout ({strange[0]})" if strange else None
    if "pre_norm.0.weight" in state:
        return "its MLP begins with a norm"
    if "fc2.weight" in state:
        return "it is an MLP of version 1 (ReLU)"
    if not {"fc1.weight", "final.2.weight"} <= set(state):
        return f"its layout is unknown ({', '.join(sorted(state)[:3])}, ...)"
    return None
