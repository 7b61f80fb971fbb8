"""ViTDet's windows: most blocks attend within squares of patches, some over the whole picture.

Upstream: NVlabs/RADIO `vitdet.py`, after ViTDet (2203.16527). CLS rows and registers are set aside
in windowed blocks. AM-RADIO (2312.06709, 4) draws the window's size at random in training.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

NUM_GLOBAL = 4  # upstream's default

Block = Callable[[Tensor, int], Tensor]


def windowed_blocks(depth: int, num_windowed: int | None, num_global: int) -> list[bool]:
    """Return for each block whether it attends within windows; the last one never does.

    `num_windowed` windowed blocks go before each global one, or, when that is None, as many as
    make about `num_global` global ones. ValueError for counts that make no sense.

    Recipe: which blocks stay global; NVlabs/RADIO radio/vitdet.py; student.num_windowed,
    student.num_global; tests/test_windows.py::test_blocks_alternate_as_upstreams.
    """
    if num_global < 1 or (num_windowed is not None and num_windowed < 0):
        raise ValueError(
            f"num_windowed is {num_windowed} and num_global {num_global}; expected None or at "
            "least 0, and at least 1."
        )
    period = max(1, depth // num_global) if num_windowed is None else num_windowed + 1
    return [index % period < period - 1 and index < depth - 1 for index in range(depth)]


def check_window(window: int, grid: tuple[int, int], patch_size: int, merge_per_block: int) -> None:
    """Refuse (ValueError) windows that do not tile the grid, and windows with token merging."""
    if merge_per_block:
        raise ValueError(
            f"window={window} and merge_per_block={merge_per_block} exclude each other: windows "
            "need every patch in its place; set one of them to None and 0."
        )
    if window < 1:
        raise ValueError(f"window is {window} patches a side, expected 1 or more (None: off).")
    for side in grid:
        if side % window:
            below = side // window * window
            sizes = [tokens * patch_size for tokens in (below, below + window) if tokens]
            raise ValueError(
                f"A side of {side * patch_size} px is {side} patches, no multiple of the window "
                f"of {window}; the nearest that fit: {' and '.join(map(str, sizes))} px."
            )


def into_windows(
    patches: Float[Tensor, "batch patches width"], grid: tuple[int, int], window: int
) -> Float[Tensor, "batch patches width"]:
    """Reorder a grid's patches from row by row to window by window, each row by row."""
    rows, columns = grid
    cut = patches.unflatten(1, (rows // window, window, columns // window, window))
    windows: Tensor = cut.transpose(2, 3).flatten(1, 4)
    return windows


def out_of_windows(
    patches: Float[Tensor, "batch patches width"], grid: tuple[int, int], window: int
) -> Float[Tensor, "batch patches width"]:
    """Undo `into_windows`."""
    rows, columns = grid
    cut = patches.unflatten(1, (rows // window, columns // window, window, window))
    raster: Tensor = cut.transpose(2, 3).flatten(1, 4)
    return raster


def through_windows(
    blocks: Sequence[Block],
    is_windowed: Sequence[bool],
    tokens: Float[Tensor, "batch tokens width"],
    grid: tuple[int, int],
    window: int,
) -> Float[Tensor, "batch tokens width"]:
    """Run the blocks, each called with its tokens and the number of windows that they form.

    One permutation on the way in and one on the way out; prefix tokens, which are those before
    the grid's, only go through the global blocks.

    Recipe: windowed attention; ViTDet (2203.16527); stages[].partitions.*.window,
    student.num_windowed, student.num_global;
    tests/test_windows.py::test_windows_are_a_masked_attention.
    """
    num_patches = grid[0] * grid[1]
    num_prefix = tokens.shape[1] - num_patches
    prefix, patches = tokens[:, :num_prefix], into_windows(tokens[:, num_prefix:], grid, window)
    for block, windowed in zip(blocks, is_windowed, strict=True):
        if windowed:
            patches = block(patches, num_patches // window**2)
        else:
            tokens = block(torch.cat([prefix, patches], dim=1), 1)
            prefix, patches = tokens[:, :num_prefix], tokens[:, num_prefix:]
    return torch.cat([prefix, out_of_windows(patches, grid, window)], dim=1)
