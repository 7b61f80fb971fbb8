"""Token merging: ToMe inside the blocks (arXiv 2210.09461), tomesd's 2-D windows after them.

Tokens keep their raster order; sizes and averages are float32 because bfloat16 cannot count past
256. Choosing who merges has no gradient, averaging has.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor


@dataclass(frozen=True)
class MergedTokens:
    """Groups' means `tokens` [B, K, D], their `sizes` [B, K], each input's group `assignment`."""

    tokens: Float[Tensor, "batch groups width"]
    sizes: Float[Tensor, "batch groups"]
    assignment: Int64[Tensor, "batch tokens"]


def merge_by(
    features: Float[Tensor, "batch tokens width"],
    sizes: Float[Tensor, "batch tokens"],
    assignment: Int64[Tensor, "batch tokens"],
    num_groups: int,
) -> tuple[Float[Tensor, "batch groups width"], Float[Tensor, "batch groups"]]:
    """Return each group's mean, weighted by size (ToMe's merge_wavg), and its summed size."""
    batch, _, width = features.shape
    weights = sizes.float()
    totals = weights.new_zeros(batch, num_groups).scatter_add(1, assignment, weights)
    # Weights that sum to 1 leave a token that is alone in its group bit for bit as it was.
    shares = (weights / totals.gather(1, assignment))[..., None]
    index = assignment[..., None].expand(-1, -1, width)
    sums = torch.zeros(batch, num_groups, width, dtype=torch.float32, device=features.device)
    merged = sums.scatter_add(1, index, features.float() * shares)
    return merged.to(features.dtype), totals


def unmerge(
    tokens: Float[Tensor, "batch groups width"] | MergedTokens,
    assignment: Int64[Tensor, "batch tokens"] | None = None,
) -> Float[Tensor, "batch tokens width"]:
    """Copy each group's token to all its members; a MergedTokens brings its own assignment."""
    if isinstance(tokens, MergedTokens):
        assignment = tokens.assignment if assignment is None else assignment
        tokens = tokens.tokens
    if assignment is None:
        raise ValueError("unmerge needs the assignment that merging returned beside the tokens.")
    return tokens.gather(1, assignment[..., None].expand(-1, -1, tokens.shape[-1]))


@torch.no_grad()
def match_tokens(
    metric: Float[Tensor, "batch tokens channels"], num_merged: int, is_destination: Tensor
) -> Int64[Tensor, "batch tokens"]:
    """Assign the `num_merged` sources most like a destination to it; all others stay alone.

    `is_destination` is bool [tokens], the same in every sample. Equal scores are decided by the
    lower index.
    """
    tokens = metric.shape[1]
    destinations = is_destination.nonzero()[:, 0]
    sources = (~is_destination).nonzero()[:, 0]
    if not 0 <= num_merged <= len(sources) or (num_merged and not len(destinations)):
        raise ValueError(
            f"Cannot merge {num_merged} of {len(sources)} sources into {len(destinations)} "
            f"destinations; ask for 0 to {len(sources) if len(destinations) else 0}."
        )
    if num_merged == 0:
        return torch.arange(tokens, device=metric.device).expand(metric.shape[0], -1).clone()
    # F.normalize's floor gives a token of zeros the score 0, where a plain division gives NaN.
    unit = F.normalize(metric.float(), dim=-1)
    scores = unit[:, sources] @ unit[:, destinations].transpose(1, 2)
    best, nearest = scores.max(dim=-1)
    chosen = best.argsort(dim=-1, descending=True, stable=True)[:, :num_merged]
    target = torch.arange(tokens, device=metric.device).expand(metric.shape[0], -1).clone()
    target.scatter_(1, sources[chosen], destinations[nearest.gather(1, chosen)])
    is_kept = torch.ones_like(target).scatter_(1, sources[chosen], 0)
    rank = is_kept.cumsum(dim=1) - 1
    return rank.gather(1, target)


def alternating(tokens: int, device: torch.device) -> Tensor:
    """Return ToMe's split: the odd tokens are destinations; bool [tokens]."""
    return torch.arange(tokens, device=device) % 2 == 1


def window_strides(grid: tuple[int, int], num_tokens: int) -> tuple[int, int]:
    """Return the (rows, columns) of the windows, as many as fit into `num_tokens`.

    Windows at most twice as long as wide are preferred, the squarest first.
    """
    height, width = grid
    fitting = [
        (max(sy, sx) > 2 * min(sy, sx), -windows, max(sy, sx) / min(sy, sx), sy, sx)
        for sy in range(1, height + 1)
        for sx in range(1, width + 1)
        if (windows := math.ceil(height / sy) * math.ceil(width / sx)) <= num_tokens
    ]
    return min(fitting)[3:]


def windowed(grid: tuple[int, int], num_tokens: int, device: torch.device) -> Tensor:
    """Return tomesd's split without its randomness: each window's top left is the destination.

    Recipe: a destination in each window of the picture; ToMe SD (2303.17604); encode(merge_to);
    tests/test_token_merging.py::test_uniform_regions_merge_into_their_window.
    """
    sy, sx = window_strides(grid, num_tokens)
    rows = torch.arange(grid[0], device=device) % sy == 0
    columns = torch.arange(grid[1], device=device) % sx == 0
    return (rows[:, None] & columns[None, :]).flatten()


def _check(shape: torch.Size, num_tokens: int, grid: tuple[int, int] | None) -> None:
    if num_tokens < 1:
        raise ValueError(f"num_tokens is {num_tokens}, expected 1 to {shape[1]}.")
    if grid is not None and grid[0] * grid[1] != shape[1]:
        raise ValueError(
            f"The grid {grid[0]}x{grid[1]} has {grid[0] * grid[1]} cells but there are "
            f"{shape[1]} tokens; pass (rows, columns) of these tokens, without prefix tokens."
        )


def merge_tokens(
    features: Float[Tensor, "batch tokens width"],
    num_tokens: int,
    grid: tuple[int, int] | None = None,
) -> MergedTokens:
    """Merge to exactly `num_tokens` tokens per sample; as they are when there are no more.

    With `grid` (rows, columns) destinations are spread over the picture and one round reaches any
    count; without, alternating tokens merge, in as many rounds as halving needs.

    Recipe: token merging once, to a fixed count; RADIOv2.5 (2412.07679); encode(merge_to);
    tests/test_token_merging.py::test_mass_count_and_groups.
    """
    _check(features.shape, num_tokens, grid)
    batch, count, _ = features.shape
    tokens = features
    sizes = torch.ones(batch, count, dtype=torch.float32, device=features.device)
    assignment = torch.arange(count, device=features.device).expand(batch, -1).clone()
    while tokens.shape[1] > num_tokens:
        count = tokens.shape[1]
        if grid is None:
            destinations = alternating(count, features.device)
            num_merged = min(count - num_tokens, (count + 1) // 2)
        else:
            destinations = windowed(grid, num_tokens, features.device)
            num_merged = count - num_tokens
        step = match_tokens(tokens, num_merged, destinations)
        tokens, sizes = merge_by(tokens, sizes, step, count - num_merged)
        assignment = step.gather(1, assignment)
    return MergedTokens(tokens, sizes, assignment)


class BlockMerging:
    """ToMe through the depth of a ViT: after each attention `per_block` patch tokens merge.

    Prefix tokens (CLS and registers) are never merged: upstream protects only the first, and
    an encoder with several would lose them.

    Recipe: token merging in every block; ToMe (2210.09461); student.merge_per_block,
    stages[].partitions.*.merge_per_block;
    tests/test_token_merging.py::test_blocks_compose_and_stop_at_one_token.
    """

    def __init__(
        self, batch: int, patches: int, num_prefix: int, per_block: int, device: torch.device
    ):
        if per_block < 1:
            raise ValueError(f"merge_per_block is {per_block}, expected 1 or more (0: no merging).")
        self.per_block = per_block
        self.num_prefix = num_prefix
        self.sizes = torch.ones(batch, patches, dtype=torch.float32, device=device)
        self.assignment = torch.arange(patches, device=device).expand(batch, -1).clone()
        self._has_merged = False

    def key_bias(self, dtype: torch.dtype) -> Tensor | None:
        """Return log sizes [B, 1, 1, tokens] for the key logits; None while all sizes are 1.

        Recipe: proportional attention; ToMe (2210.09461); student.merge_per_block,
        stages[].partitions.*.merge_per_block;
        tests/test_token_merging.py::test_proportional_attention_is_exact_for_duplicates.
        """
        if not self._has_merged:
            return None
        return F.pad(self.sizes.log(), (self.num_prefix, 0))[:, None, None, :].to(dtype)

    def step(
        self,
        tokens: Float[Tensor, "batch tokens width"],
        keys: Float[Tensor, "batch heads tokens head"],
    ) -> Float[Tensor, "batch fewer width"]:
        """Merge by the heads' mean key (ToMe 3) and return prefix and merged patches."""
        prefix, patches = tokens[:, : self.num_prefix], tokens[:, self.num_prefix :]
        count = patches.shape[1]
        num_merged = min(self.per_block, count // 2)
        if num_merged == 0:
            return tokens
        metric = keys[:, :, self.num_prefix :].detach().float().mean(dim=1)
        step = match_tokens(metric, num_merged, alternating(count, tokens.device))
        merged, self.sizes = merge_by(patches, self.sizes, step, count - num_merged)
        self.assignment = step.gather(1, self.assignment)
        self._has_merged = True
        return torch.cat([prefix, merged], dim=1)
