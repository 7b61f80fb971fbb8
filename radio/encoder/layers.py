"""Intermediate activations: the patch tokens that a block gives, in the middle of a forward.

RADIOv2.5 (2412.07679, finding 8): they help when they are mixed non-linearly. NVlabs/RADIO
`forward_intermediates.py` counts blocks in the same way, from 0 or from the end.
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager

from jaxtyping import Float
from torch import Tensor, nn

from radio.errors import RadioError
from student.windows import out_of_windows


def layer_name(index: int) -> str:
    """Return the feature name of a block's patch tokens."""
    return f"layer_{index}:features"


def layer_names(layers: Sequence[int], depth: int) -> tuple[str, ...]:
    """Return the feature names of blocks given by number, negative ones from the end.

    Raises:
        RadioError: no such block, with the range of those that are there.
    """
    if layers and not depth:
        raise RadioError(
            "this encoder has no layers to ask for: they are our own ViT's blocks, and its "
            "backbone is a timm model; leave layers out"
        )
    for index in layers:
        if not -depth <= index < depth:
            raise RadioError(
                f"there is no layer {index}; this encoder has 0 to {depth - 1}, or -{depth} to -1 "
                "from the end"
            )
    return tuple(layer_name(index % depth) for index in layers)


@contextmanager
def tokens_after(blocks: nn.ModuleList, layers: Collection[int]) -> Iterator[dict[int, Tensor]]:
    """Collect by number what the blocks give to this thread while the context is open."""
    found: dict[int, Tensor] = {}
    thread = threading.get_ident()  # another one may be encoding with the same blocks

    def keep(index: int, output: Tensor) -> None:
        if threading.get_ident() == thread:
            found[index] = output

    with ExitStack() as stack:
        for index in set(layers):
            hook = blocks[index].register_forward_hook(
                lambda _module, _inputs, output, index=index: keep(index, output)
            )
            stack.callback(hook.remove)
        yield found


def patches_of(
    tokens: Float[Tensor, "batch tokens width"], grid: tuple[int, int], window: int | None
) -> Float[Tensor, "batch patches width"]:
    """Return the patches of a block's output, row by row.

    They are its last tokens, in a windowed block its only ones, and lie window by window wherever
    the forward has windows.
    """
    patches = tokens[:, -grid[0] * grid[1] :]
    return patches if window is None else out_of_windows(patches, grid, window)
