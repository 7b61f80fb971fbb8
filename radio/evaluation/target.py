"""Whatever can be measured, by one interface: `Target`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import UInt8
from torch import Tensor

from radio.errors import RadioError
from teachers.text import TEXT_KINDS, TextTower

if TYPE_CHECKING:
    from teachers.sam import MaskDecoder

MASK_KINDS = ("sam",)
OUTPUTS = ("summary", "features")


class Target(ABC):
    """What a task measures: pixels in, summaries and feature maps out.

    `names` are the outputs it can give; `facts` say of each adaptor of an encoder which teacher
    it stands for (kind, options, pretrained, seed). Sides in px are multiples of `patch`, and
    `native_size` alone unless it `takes_any_size`. `fingerprint` is a SHA-256 over the weights
    and how they are read. Features of a target that is cheaper to run than to keep are not
    `is_kept`.
    """

    is_kept = True

    def __init__(
        self,
        name: str,
        fingerprint: str,
        names: Sequence[str],
        *,
        native_size: int,
        patch: int,
        takes_any_size: bool = True,
        facts: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        self.name = name
        self.fingerprint = fingerprint
        self.names = tuple(names)
        self.native_size = native_size
        self.patch = patch
        self.takes_any_size = takes_any_size
        self.facts = dict(facts or {})

    @abstractmethod
    def extract(
        self, images: UInt8[Tensor, "batch 3 h w"], names: Sequence[str]
    ) -> dict[str, Tensor]:
        """Return float32 outputs on the CPU: summaries [b, d], features [b, d, rows, columns]."""

    def size_for(self, name: str) -> int:
        """Return the side in px at which an output is taken when none is asked for."""
        return self.native_size

    def check(self, name: str) -> None:
        """Refuse an output that the target cannot give, listing those it can."""
        if name not in self.names:
            raise RadioError(
                f"target '{self.name}' has no output '{name}'; it has: {', '.join(self.names)}"
            )

    def checked_size(self, size: int) -> int:
        """Return the side, or refuse one that the target cannot take, with what it can."""
        if not self.takes_any_size and size != self.native_size:
            raise RadioError(
                f"target '{self.name}' takes pictures of {self.native_size} px only, not of {size}"
            )
        if size < self.patch or size % self.patch:
            low = max(self.patch, size // self.patch * self.patch)
            high = -(-size // self.patch) * self.patch
            nearest = " and ".join(str(side) for side in dict.fromkeys((low, high)))
            raise RadioError(
                f"{size} px is no multiple of the {self.patch} px of a patch of target "
                f"'{self.name}'; nearest: {nearest}"
            )
        return size

    def output(self, kind: str, adaptor: str | None = None) -> str:
        """Return the name of an output, "summary" or "features", behind an adaptor if one is given.

        Raises:
            RadioError: the target cannot give it; the message lists what it can.
        """
        name = kind if adaptor is None else f"{adaptor}:{kind}"
        self.check(name)
        return name

    def text_adaptor(self, adaptor: str | None = None) -> str | None:
        """Return the adaptor whose text tower is meant, the first that has one if none is named.

        None where there are no adaptors: a teacher's own summary is compared.

        Raises:
            RadioError: there is no text tower; the message lists what has one.
        """
        raise RadioError(lacks(self.name, "text tower", TEXT_KINDS))

    def text_tower(self, adaptor: str | None = None, tokenizer: str | None = None) -> TextTower:
        """Return the text tower that `text_adaptor` chooses, on the CPU; errors as there.

        `tokenizer` is a folder; without it the files next to the teacher's weights are taken.
        """
        raise RadioError(lacks(self.name, "text tower", TEXT_KINDS))

    def mask_adaptor(self, adaptor: str | None = None) -> str | None:
        """Return the adaptor whose features a mask decoder reads; as `text_adaptor`."""
        raise RadioError(lacks(self.name, "mask decoder", MASK_KINDS))

    def mask_decoder(self, adaptor: str | None = None) -> MaskDecoder:
        """Return the mask decoder that `mask_adaptor` chooses, on the CPU; errors as there."""
        raise RadioError(lacks(self.name, "mask decoder", MASK_KINDS))


def lacks(name: str, what: str, kinds: Sequence[str] | Mapping[str, Any]) -> str:
    """Return the message for a target that has no text tower or mask decoder."""
    return (
        f"target '{name}' has no {what}; expected a teacher of kind {' or '.join(kinds)}, or an "
        "encoder with an adaptor to one"
    )


def device() -> torch.device:
    """Return where models run: CUDA where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
