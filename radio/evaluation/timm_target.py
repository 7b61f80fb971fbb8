"""A timm model as a target."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, cast

import torch
from jaxtyping import UInt8
from torch import Tensor, nn

from radio.errors import RadioError
from radio.evaluation.target import OUTPUTS, Target, device

# What timm's models raise on pictures that they cannot take.
UNFIT = (AssertionError, IndexError, RuntimeError, TypeError, ValueError)


class TimmTarget(Target):
    """A timm model: its pooled features before the classifier, and its feature map."""

    def __init__(self, name: str, model: nn.Module) -> None:
        import timm

        self.model = model.eval().requires_grad_(False).to(device())
        settings = timm.data.resolve_model_data_config(model)
        self.mean, self.std = settings["mean"], settings["std"]
        # Only timm's ViTs have prefix tokens, and only models with another order name it.
        self._num_prefix = int(getattr(model, "num_prefix_tokens", 0))
        self._is_channels_last = getattr(model, "output_fmt", "NCHW") == "NHWC"
        native = int(settings["input_size"][-1])
        patch = _stride(name, model)
        digest = hashlib.sha256(f"{self.mean}{self.std}{type(model).__name__}".encode())
        for key, weight in sorted(model.state_dict().items()):
            digest.update(f"{key} {weight.dtype} {tuple(weight.shape)}".encode())
            digest.update(weight.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        self.patch = patch  # read by extract, which looks whether other sizes are taken
        super().__init__(
            name,
            digest.hexdigest(),
            OUTPUTS,
            native_size=native,
            patch=patch,
            takes_any_size=self._takes(2 * patch) and self._takes(3 * patch),
        )

    @torch.no_grad()
    def extract(
        self, images: UInt8[Tensor, "batch 3 h w"], names: Sequence[str]
    ) -> dict[str, Tensor]:
        """Return `forward_head(..., pre_logits=True)` and `forward_features` as a map."""
        pixels = images.to(device()).float() / 255
        mean, std = (pixels.new_tensor(v)[:, None, None] for v in (self.mean, self.std))
        model = cast(Any, self.model)
        tokens = model.forward_features((pixels - mean) / std)
        found: dict[str, Tensor] = {}
        if "summary" in names:
            found["summary"] = model.forward_head(tokens, pre_logits=True).flatten(1)
        if "features" in names:
            rows, columns = (int(side) // self.patch for side in images.shape[-2:])
            found["features"] = self._map(tokens, rows, columns)
        return {name: found[name].float().cpu() for name in names}

    def _map(self, found: Tensor, rows: int, columns: int) -> Tensor:
        if found.ndim == 3:
            patches = found[:, self._num_prefix :].transpose(1, 2)
            return patches.reshape(len(found), -1, rows, columns)
        return found.permute(0, 3, 1, 2).contiguous() if self._is_channels_last else found

    def _takes(self, size: int) -> bool:
        """Look at one black picture: timm's tables do not say which sizes a model takes."""
        try:
            self.extract(torch.zeros(1, 3, size, size, dtype=torch.uint8), OUTPUTS)
        except UNFIT:
            return False
        return True


def timm_target(shown: str, name: str) -> TimmTarget:
    """Build a timm model with timm's own weights; `shown` is how the target was called.

    Raises:
        RadioError: no such model, no pretrained weights of it, or they cannot be downloaded.
    """
    import timm

    # A ViT takes one size unless it is told otherwise; other models know no such argument.
    attempts: list[dict[str, Any]] = [{"dynamic_img_size": True}, {}]
    for at, options in enumerate(attempts):
        try:
            model = timm.create_model(name, pretrained=True, num_classes=0, **options)
        except TypeError as error:
            if at == len(attempts) - 1:
                raise RadioError(f"timm cannot build '{name}': {error}") from error
        except (OSError, RuntimeError, ValueError) as error:
            raise RadioError(
                f"timm cannot load '{name}' with pretrained weights ({_short(error)}); expected a "
                "name of timm.list_pretrained(), and its weights on disk or a network to fetch them"
            ) from error
        else:
            return TimmTarget(shown, model)
    raise AssertionError("the last attempt returns or raises")


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def _stride(name: str, model: nn.Module) -> int:
    info = getattr(model, "feature_info", None)
    if not info:
        raise RadioError(f"timm's '{name}' does not say its stride; it cannot be measured")
    return int(info[-1]["reduction"])
