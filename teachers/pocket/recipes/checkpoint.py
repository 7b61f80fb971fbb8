"""A training's state on disk, so that a run that was cut off goes on where it was."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from teachers.pocket.recipes.data import RecipeError

EVERY = 600.0  # seconds


@dataclass(frozen=True)
class Origin:
    """What decides a training's weights beside the code; `data` is a hash of the image sets."""

    seed: int
    steps: int
    data: str


class Checkpoint:
    """What a training must remember: parts with a state dict, scalars, a generator, curve, step.

    `step` is where to go on from; global random numbers are drawn anew from (seed, step) by whoever
    needs them.

    Raises:
        RecipeError: the file is of a training of another origin.
    """

    def __init__(
        self,
        path: Path,
        parts: Mapping[str, Any],
        generator: torch.Generator,
        origin: Origin,
        scalars: Sequence[Tensor] = (),
    ) -> None:
        self.path = path
        self.parts = dict(parts)
        self.generator = generator
        self.origin = asdict(origin)
        self.scalars = list(scalars)
        self.curve: list[dict[str, float]] = []
        self.step = 0
        self.minutes = 0.0
        self._saved = self._begun = time.monotonic()
        if path.exists():
            state = torch.load(path, weights_only=True)
            if (found := state.get("origin")) != self.origin:
                raise RecipeError(
                    f"{path} is of {_said(found)}, but asked for is {_said(self.origin)}; give "
                    "another --work folder, or delete that one"
                )
            for name, part in self.parts.items():
                part.load_state_dict(state["parts"][name])
            for own, value in zip(self.scalars, state["scalars"], strict=True):
                own.data.copy_(value)
            generator.set_state(state["generator"])
            self.curve, self.step = state["curve"], state["step"]
            self.minutes = state["minutes"]

    def told(self, **values: float) -> None:
        """Add a row to the curve and print it."""
        minutes = self.minutes + (time.monotonic() - self._begun) / 60
        self.curve.append({"step": self.step, "minutes": round(minutes, 2), **values})
        print(self.curve[-1], flush=True)

    def done(self, finished: bool) -> None:
        """Count a step; write the state every ten minutes and when all is done."""
        self.step += 1
        now = time.monotonic()
        if not finished and now - self._saved < EVERY:
            return
        state = {
            "origin": self.origin,
            "parts": {name: part.state_dict() for name, part in self.parts.items()},
            "scalars": [own.detach().clone() for own in self.scalars],
            "generator": self.generator.get_state(),
            "curve": self.curve,
            "step": self.step,
            "minutes": self.minutes + (now - self._begun) / 60,
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        part = self.path.with_suffix(".part")
        torch.save(state, part)
        part.replace(self.path)
        self._saved = now


def _said(origin: Mapping[str, Any] | None) -> str:
    if origin is None:
        return "a seed and data that it does not tell"
    return f"seed {origin['seed']}, {origin['steps']} steps, data {origin['data'][:12]}"
