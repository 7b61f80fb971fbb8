"""Depth in training: stochastic depth's rates (1603.09382), and blocks that are computed twice."""

from __future__ import annotations

import copy
from collections.abc import Callable

from jaxtyping import Float
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from student.token_merging import BlockMerging

Block = Callable[[Tensor, BlockMerging | None, int], Tensor]


def drop_path_rates(last: float, depth: int) -> list[float]:
    """Return each block's rate, growing linearly from 0 to `last`; timm's rule.

    ValueError for a rate outside [0, 1).

    Recipe: drop path; Stochastic depth (1603.09382); student.drop_path;
    tests/test_student_options.py::test_blocks_drop_as_timms_do.
    """
    if not 0 <= last < 1:
        raise ValueError(f"drop_path is {last}, expected 0 (off) or more and less than 1.")
    return [last * index / max(1, depth - 1) for index in range(depth)]


def checkpointed(
    block: Block,
    tokens: Float[Tensor, "batch tokens width"],
    merging: BlockMerging | None,
    num_windows: int,
) -> tuple[Float[Tensor, "batch after width"], BlockMerging | None]:
    """Run a block without keeping its activations; return its tokens and the merging after it.

    The second run starts from the first one's random state and merging.
    """

    def run(tokens: Tensor, before: BlockMerging | None) -> tuple[Tensor, BlockMerging | None]:
        after = copy.copy(before)  # a block replaces its members, and both runs must find the old
        return block(tokens, after, num_windows), after

    out: tuple[Tensor, BlockMerging | None] = checkpoint(run, tokens, merging, use_reentrant=False)
    return out
