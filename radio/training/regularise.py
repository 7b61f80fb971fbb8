"""What keeps the student's weights smooth: DAMP's noise while it trains, and its moving average."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from timm.utils import ModelEmaV3


@contextlib.contextmanager
def damp(module: nn.Module, std: float, generator: torch.Generator) -> Iterator[None]:
    """Let every Linear in the block compute with W * xi, xi = 1 + std * N(0, 1) (DAMP 2406.16540).

    xi is drawn once, on the generator's device, in the order of `module.modules()`, and holds for
    the whole block; with g the gradient at W * xi, W receives g * xi. Biases and other layers are
    exact. Parameters, state dict and their order stay what they are, inside the block too; a
    backward pass may follow outside, unless activations are recomputed in it.

    Args:
        module: the student, or any part of it.
        std: sigma; the authors train ViTs with 0.15, NVIDIA's is not published.
        generator: what makes the step's noise a function of the step; on the weights' device it
            spares a copy.

    Recipe: multiplicative noise on the weights; DAMP (2406.16540); student.damp;
    tests/test_regularise.py::test_damp_follows_its_oracle.
    """
    linears = [each for each in module.modules() if isinstance(each, nn.Linear)]
    outer = [each.__dict__.get("forward") for each in linears]
    try:
        for linear in linears:
            # A parametrization would move the weight behind the bias when it is removed, and with
            # it the order of the parameters.
            linear.__dict__["forward"] = _perturbed(linear, std, generator)
        yield
    finally:
        for linear, forward in zip(linears, outer, strict=True):
            linear.__dict__.pop("forward", None)
            if forward is not None:
                linear.__dict__["forward"] = forward


def _perturbed(
    linear: nn.Linear, std: float, generator: torch.Generator
) -> Callable[[Tensor], Tensor]:
    noise = torch.randn(linear.weight.shape, generator=generator, device=generator.device)
    factor = (1 + std * noise).to(linear.weight)
    return lambda input: F.linear(input, linear.weight * factor, linear.bias)


def ema_decay(decay: float, step: int) -> float:
    """Return min(decay, (1 + step) / (10 + step)), as tf.train.ExponentialMovingAverage warms up.

    `step` counts from 0. timm's own warm-up is another, 1 - (1 + step)^(-2/3).
    """
    return min(decay, (1 + step) / (10 + step))


class Ema:
    """theta~ = d theta~ + (1 - d) theta after every step, d = `ema_decay(decay, step)`.

    timm's ModelEmaV3 averages; the warm-up, the frozen float32 copy and the names are ours.
    (torch's AveragedModel overwrites at its first update and knows no step but its own count.)
    Buffers are copied. The average is in eval mode, and nothing but `update` changes it.

    Recipe: moving average of the student; NVlabs/RADIO hubconf.py; optimizer.ema_decay;
    tests/test_regularise.py::test_the_average_follows_its_oracle.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        from timm.utils import ModelEmaV3  # slow import

        self.decay = decay
        self._average: ModelEmaV3 = ModelEmaV3(module, decay=decay, exclude_buffers=True)
        self._average.module.float().requires_grad_(False)

    @property
    def module(self) -> nn.Module:
        """The averaged module, to be called."""
        average: nn.Module = self._average.module
        return average

    def update(self, module: nn.Module, step: int) -> None:
        """Take in the parameters after step `step`, counted from 0."""
        self._average.decay = ema_decay(self.decay, step)
        self._average.update(module)

    def copy_to(self, module: nn.Module) -> None:
        """Write the average into a module of the same structure."""
        module.load_state_dict(self.module.state_dict())

    def state_dict(self) -> dict[str, Tensor]:
        """Return the average under the module's own names; with the step it is the whole state."""
        return dict(self.module.state_dict())

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Put a saved average back, strictly."""
        self.module.load_state_dict(state)
