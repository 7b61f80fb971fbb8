"""Any timm model as the student's backbone: convolutional, hybrid or ViT (E-RADIO's role).

The trunk is timm's `forward_features`, state dict and all, so that what is trained loads in timm
and, as a folder of model_type timm_wrapper, in transformers without remote code.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import timm
import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from student.depth import drop_path_rates
from student.radio_layout import State, below
from student.vit import InputConditioner, VitOutput, check_side
from student.warm_start import read_folder
from student.weight_files import read_file

DYNAMIC: dict[str, Any] = {"dynamic_img_size": True}
PRETRAINED = "pretrained"  # the `init` that asks timm for its own weights
WRAPPED = "timm_model."  # transformers' prefix, which it does without when it reads
# What timm's models raise on pictures that they cannot take.
UNFIT = (AssertionError, IndexError, RuntimeError, TypeError, ValueError)


class TimmTrunk(nn.Module):
    """A timm model with the contract of student.vit's VisionTransformer.

    Pixels are normalised as the timm model expects. A trunk has no CLS row for each teacher with
    a summary, so each row is an attention pooling over all tokens with one learnt query, the mean
    at the start. `width` and `patch_size` are the channels and stride in px of `forward_features`;
    a norm in the model's own head, which comes after it, stays as it is. `checkpointing` is
    timm's; where there is BatchNorm its running statistics then move twice in a step.
    ValueError for a name that timm does not know, a stride that is not `patch_size`, or a model
    for pictures of one size only.

    Recipe: any timm model as the backbone; AM-RADIO (2312.06709); student.backbone;
    tests/test_timm_student.py::test_families.
    """

    num_registers = 0

    def __init__(
        self,
        name: str,
        *,
        patch_size: int = 32,
        num_cls: int = 1,
        drop_path: float = 0.0,
        checkpointing: bool = False,
        pretrained: bool = False,
    ) -> None:
        super().__init__()
        self.name = name
        self.patch_size = patch_size
        self.num_cls = num_cls
        self.model_args = _model_args(name)
        self.trunk = _create(name, self.model_args, drop_path, pretrained)
        self.width = int(cast(Any, self.trunk).num_features)
        # Only timm's ViTs have prefix tokens, and only models with another order name it.
        self.num_prefix = int(getattr(self.trunk, "num_prefix_tokens", 0))
        self.is_channels_last = getattr(self.trunk, "output_fmt", "NCHW") == "NHWC"
        self.pretrained_cfg: dict[str, Any] = dict(cast(Any, self.trunk).pretrained_cfg)
        self.input_conditioner = InputConditioner(
            self.pretrained_cfg["mean"], self.pretrained_cfg["std"]
        )
        self.query = nn.Parameter(torch.zeros(num_cls, self.width))
        self._check_stride()
        if checkpointing:
            self._checkpoint()

    def forward(
        self,
        images: UInt8[Tensor, "batch 3 h w"] | Float[Tensor, "batch 3 h w"],
        merge_per_block: int = 0,
        window: int | None = None,
    ) -> VitOutput:
        """Encode uint8 images, or floats in [0, 1].

        ValueError for sides that are no multiple of the stride, for token merging and for windows.
        """
        if merge_per_block or window is not None:
            raise ValueError(
                f"merge_per_block={merge_per_block} and window={window} are our ViT's, and the "
                f"student's backbone is timm's {self.name}; set merge_per_block to 0 and window to "
                "null, or student.backbone to null."
            )
        for side in images.shape[-2:]:
            check_side(side, self.patch_size)
        rows, columns = (side // self.patch_size for side in images.shape[-2:])
        tokens = self._tokens(self.input_conditioner(images))
        features = tokens[:, self.num_prefix :].transpose(1, 2).unflatten(2, (rows, columns))
        return VitOutput(self._pooled(tokens), tokens[:, :0], features)

    def _tokens(self, pixels: Float[Tensor, "batch 3 h w"]) -> Float[Tensor, "batch tokens width"]:
        """Return what `forward_features` gives, in whatever order, as tokens row by row."""
        found: Tensor = cast(Any, self.trunk).forward_features(
            pixels.to(next(self.trunk.parameters()).dtype)
        )
        if found.ndim == 3:
            return found
        return found.flatten(1, 2) if self.is_channels_last else found.flatten(2).transpose(1, 2)

    def _pooled(
        self, tokens: Float[Tensor, "batch tokens width"]
    ) -> Float[Tensor, "batch cls width"]:
        """Return softmax(q LayerNorm(x)^T / sqrt(C)) x for each query; channels have no scale."""
        keys = F.layer_norm(tokens, (self.width,))
        shares = (self.query * self.width**-0.5 @ keys.transpose(1, 2)).softmax(dim=-1)
        pooled: Tensor = shares @ tokens
        return pooled

    @torch.no_grad()
    def _check_stride(self) -> None:
        """Look at the grid of a small picture that is not square, as timm's tables may be wrong."""
        info = getattr(self.trunk, "feature_info", None)
        found = int(info[-1]["reduction"]) if info else self.patch_size
        if found != self.patch_size:
            raise ValueError(
                f"student.backbone {self.name} has a stride of {found} px and student.patch_size "
                f"is {self.patch_size}; set student.patch_size={found}."
            )
        was_training = self.trunk.training
        self.trunk.eval()
        picture = torch.zeros(1, 3, 2 * self.patch_size, 3 * self.patch_size)
        try:
            count = self._tokens(picture).shape[1:]
        except UNFIT as error:
            raise ValueError(
                f"student.backbone {self.name} takes no picture of {picture.shape[2]} x "
                f"{picture.shape[3]} px ({error}); choose a convolutional model, or a ViT that "
                "knows dynamic_img_size."
            ) from error
        self.trunk.train(was_training)
        if count != (self.num_prefix + 6, self.width):
            raise ValueError(
                f"student.backbone {self.name} gives {list(count)} (tokens, channels) for a grid "
                f"of 2 x 3 patches, expected {[self.num_prefix + 6, self.width]}; choose another."
            )

    def _checkpoint(self) -> None:
        try:
            cast(Any, self.trunk).set_grad_checkpointing(True)
        except (AssertionError, AttributeError) as error:
            raise ValueError(
                f"student.backbone {self.name} cannot recompute its activations; set "
                "student.checkpointing=false."
            ) from error


def _model_args(name: str) -> dict[str, Any]:
    """Return what timm needs so that the model takes pictures of any size: a ViT must be told."""
    if not timm.is_model(name):  # timm would look for hub names, a folder's too, on the network
        raise ValueError(
            f"student.backbone is {name!r}, which is no timm model; known: timm.list_models()."
        )
    try:
        with torch.device("meta"):
            timm.create_model(name, num_classes=0, **DYNAMIC)
    except TypeError:  # it has no such argument, and most likely needs none
        return {}
    except (OSError, RuntimeError, ValueError) as error:
        raise ValueError(
            f"student.backbone is {name!r}, which timm cannot build ({error}); known: "
            "timm.list_models()."
        ) from error
    return dict(DYNAMIC)


def _create(name: str, model_args: dict[str, Any], drop_path: float, pretrained: bool) -> nn.Module:
    drop_path_rates(drop_path, 1)  # refuses what is no rate
    options = {**model_args, **({"drop_path_rate": drop_path} if drop_path else {})}
    try:
        model: nn.Module = timm.create_model(name, pretrained, num_classes=0, **options)
    except TypeError as error:
        if "drop_path_rate" not in str(error):
            raise
        raise ValueError(
            f"student.backbone {name} has no stochastic depth; set student.drop_path=0."
        ) from error
    except (OSError, RuntimeError) as error:
        raise ValueError(
            f"timm cannot load its weights of {name!r} ({error}); give a weight file as "
            "student.init, or null."
        ) from error
    return model


def build_trunk(name: str, init: str | None, **options: Any) -> TimmTrunk:
    """Build a trunk with TimmTrunk's options; `init` is "pretrained" (timm's own weights, which it
    may download), a weight file or folder for load_trunk, or None."""
    trunk = TimmTrunk(name, pretrained=init == PRETRAINED, **options)
    if init not in (None, PRETRAINED):
        load_trunk(trunk, init)
    return trunk


def load_trunk(trunk: TimmTrunk, source: str | Path) -> None:
    """Copy weights in timm's layout into the trunk; a classifier among them is left out.

    `source` is a file, or a folder of `radio fuse` or of transformers' TimmWrapperModel, whose
    normalisation of pixels is taken too. The pooling's queries start anew, as the adaptors do.
    FileNotFoundError or ValueError when it is missing or of another model.
    """
    path = Path(source)
    if not path.exists():
        raise FileNotFoundError(
            f"The weight file {path} does not exist; student.backbone {trunk.name} starts from a "
            f"file or folder in timm's layout, or from '{PRETRAINED}' (timm's own weights)."
        )
    state, config = read_folder(path) if path.is_dir() else (read_file(path)[0], {})
    _follow(trunk, config, path)
    state = below(state, WRAPPED) or state
    classifier = trunk.pretrained_cfg.get("classifier") or ()
    heads = (classifier,) if isinstance(classifier, str) else tuple(classifier)
    own = trunk.trunk.state_dict()
    state = {
        key: value
        for key, value in state.items()
        if key in own or not key.startswith(tuple(f"{head}." for head in heads))
    }
    try:
        trunk.trunk.load_state_dict(state)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:400]  # torch's is a page
        raise ValueError(
            f"{path} does not fit student.backbone {trunk.name}: {reason}; expected the state dict "
            "of that timm model."
        ) from error


@torch.no_grad()
def _follow(trunk: TimmTrunk, config: Mapping[str, Any], path: Path) -> None:
    """Normalise pixels as a folder's config.json says; ValueError for another timm model's."""
    name = str(config.get("architecture", trunk.name))
    if name.split(".")[0] != trunk.name.split(".")[0]:  # a tag says which weights, not which model
        raise ValueError(
            f"{path} holds timm's {name}; student.backbone is {trunk.name}: choose another init, "
            f"or student.backbone={name}."
        )
    prepared: Mapping[str, Any] = config.get("pretrained_cfg") or {}
    for key in {"mean", "std"} & set(prepared):
        buffer: Tensor = getattr(trunk.input_conditioner, f"norm_{key}")
        buffer.copy_(torch.tensor(prepared[key]).view(3, 1, 1))


def timm_state(trunk: TimmTrunk) -> State:
    """Return the timm model's state dict, as timm and transformers' TimmWrapperModel read it.

    Contiguous copies; spectral weights must be materialised in it (student.radio_layout). The
    pooling's `query` and the normalisation are not in it.
    """
    return {key: value.contiguous().clone() for key, value in trunk.trunk.state_dict().items()}


def from_timm(state: State, query: Tensor, mean: Sequence[float], std: Sequence[float]) -> State:
    """Return a TimmTrunk's state dict from timm_state's and what is not in it.

    `query` [num_cls, C] is the pooling's, `mean` and `std` those of pixels in [0, 1].
    """
    return {
        **{f"trunk.{key}": value for key, value in (below(state, WRAPPED) or state).items()},
        "query": query,
        "input_conditioner.norm_mean": torch.tensor(mean).view(3, 1, 1),
        "input_conditioner.norm_std": torch.tensor(std).view(3, 1, 1),
    }


def timm_config(trunk: TimmTrunk, image_size: int) -> dict[str, Any]:
    """Return a config.json: transformers' TimmWrapperConfig, which AutoModel reads natively.

    `last_hidden_state` is then `forward_features` of normalised pixels as it comes: [B, C, h, w],
    [B, h, w, C], or [B, tokens, C]. `image_size` in px is what the image processor resizes to.
    """
    mean, std = (
        getattr(trunk.input_conditioner, name).flatten().tolist()
        for name in ("norm_mean", "norm_std")
    )
    return {
        "architectures": ["TimmWrapperModel"],
        "model_type": "timm_wrapper",
        "architecture": trunk.name,
        "model_args": trunk.model_args or None,
        "do_pooling": False,
        "num_classes": 0,
        "num_features": trunk.width,
        "dtype": "float32",
        "pretrained_cfg": {
            "input_size": [3, image_size, image_size],
            "interpolation": "bicubic",
            "crop_pct": 1.0,
            "crop_mode": "squash",
            "mean": mean,
            "std": std,
        },
    }
