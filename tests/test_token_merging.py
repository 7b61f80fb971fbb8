"""Properties of token merging."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from student.token_merging import (
    BlockMerging,
    alternating,
    match_tokens,
    merge_by,
    merge_tokens,
    unmerge,
    window_strides,
    windowed,
)
from student.vit import attention

cases = st.tuples(
    st.integers(1, 3), st.integers(1, 9), st.integers(1, 9), st.integers(1, 90), st.booleans()
)


def draw(
    case: tuple[int, int, int, int, bool],
) -> tuple[torch.Tensor, int, tuple[int, int] | None]:
    batch, rows, columns, num_tokens, has_grid = case
    generator = torch.Generator().manual_seed(rows * 100 + columns)
    features = torch.randn(batch, rows * columns, 6, generator=generator)
    return features, num_tokens, (rows, columns) if has_grid else None


@settings(max_examples=150, deadline=None)
@given(cases)
def test_mass_count_and_groups(case: tuple[int, int, int, int, bool]) -> None:
    features, num_tokens, grid = draw(case)
    total = features.shape[1]
    merged = merge_tokens(features, num_tokens, grid)
    groups = min(num_tokens, total)
    assert merged.tokens.shape == (features.shape[0], groups, 6)
    assert (merged.sizes.sum(1) == total).all()
    sums = (merged.sizes[..., None] * merged.tokens).sum(1)
    torch.testing.assert_close(sums, features.sum(1), atol=2e-5, rtol=1e-5)
    for sample in range(features.shape[0]):  # every group has members, as many as its size
        counts = torch.bincount(merged.assignment[sample], minlength=groups)
        assert torch.equal(counts.float(), merged.sizes[sample])
        for group in range(groups):
            mean = features[sample, merged.assignment[sample] == group].mean(0)
            torch.testing.assert_close(merged.tokens[sample, group], mean, atol=1e-5, rtol=1e-5)


@settings(max_examples=60, deadline=None)
@given(cases)
def test_merging_what_was_unmerged_changes_nothing(case: tuple[int, int, int, int, bool]) -> None:
    features, num_tokens, grid = draw(case)
    merged = merge_tokens(features, num_tokens, grid)
    spread = unmerge(merged)
    assert torch.equal(spread, unmerge(merged.tokens, merged.assignment))
    ones = torch.ones(spread.shape[:2])
    again, sizes = merge_by(spread, ones, merged.assignment, merged.tokens.shape[1])
    torch.testing.assert_close(again, merged.tokens)
    assert torch.equal(sizes, merged.sizes)


@settings(max_examples=40, deadline=None)
@given(cases)
def test_samples_do_not_see_each_other(case: tuple[int, int, int, int, bool]) -> None:
    features, num_tokens, grid = draw(case)
    together = merge_tokens(features, num_tokens, grid)
    for sample in range(features.shape[0]):
        alone = merge_tokens(features[sample : sample + 1], num_tokens, grid)
        assert torch.equal(alone.assignment[0], together.assignment[sample])
        torch.testing.assert_close(alone.tokens[0], together.tokens[sample])


@pytest.mark.parametrize("grid", [None, (5, 7)])
@pytest.mark.parametrize("num_tokens", [35, 36, 1000])
def test_enough_tokens_is_the_identity(num_tokens: int, grid: tuple[int, int] | None) -> None:
    features = torch.randn(2, 35, 4)
    merged = merge_tokens(features, num_tokens, grid)
    assert torch.equal(merged.tokens, features)
    assert torch.equal(unmerge(merged), features)
    assert (merged.sizes == 1).all()


@pytest.mark.parametrize("grid", [None, (6, 6)])
@pytest.mark.parametrize("value", [0.0, 3.7])
def test_constant_features_stay_constant(value: float, grid: tuple[int, int] | None) -> None:
    merged = merge_tokens(torch.full((2, 36, 5), value), 5, grid)
    torch.testing.assert_close(merged.tokens, torch.full((2, 5, 5), value))
    assert merged.sizes.sum() == 72


def test_the_closest_pair_merges_first() -> None:
    features = torch.eye(8)[None].clone()
    features[0, 4] = features[0, 1] * 2 + 0.01
    merged = merge_tokens(features, 7)
    assert merged.assignment[0, 4] == merged.assignment[0, 1]
    assert sorted(merged.sizes[0].tolist()) == [1] * 6 + [2]
    # the others keep their raster order
    others = [int(merged.assignment[0, i]) for i in (0, 1, 2, 3, 5, 6, 7)]
    assert others == list(range(7))


def test_uniform_regions_merge_into_their_window() -> None:
    """Four quarters of four colours to four tokens: each becomes its own token."""
    colours = torch.eye(4).reshape(2, 2, 4)
    features = colours.repeat_interleave(4, 0).repeat_interleave(4, 1).reshape(1, 64, 4)
    merged = merge_tokens(features, 4, (8, 8))
    assert torch.equal(merged.tokens[0], torch.eye(4))
    assert (merged.sizes == 16).all()


@pytest.mark.parametrize("grid", [(16, 16), (12, 20), (1, 30), (7, 5)])
@pytest.mark.parametrize("num_tokens", [1, 2, 5, 16, 30])
def test_windows_fit_and_cover(grid: tuple[int, int], num_tokens: int) -> None:
    sy, sx = window_strides(grid, num_tokens)
    destinations = windowed(grid, num_tokens, torch.device("cpu")).reshape(grid)
    assert 1 <= destinations.sum() <= num_tokens
    for y in range(grid[0]):
        for x in range(grid[1]):
            assert destinations[y // sy * sy, x // sx * sx]


def test_square_windows_where_they_fit() -> None:
    assert window_strides((16, 16), 64) == (2, 2)
    assert window_strides((16, 16), 16) == (4, 4)


def test_equal_scores_are_decided_by_order() -> None:
    assignment = match_tokens(torch.ones(1, 6, 3), 2, alternating(6, torch.device("cpu")))
    assert assignment.tolist() == [[0, 0, 0, 1, 2, 3]]


def test_proportional_attention_is_exact_for_duplicates() -> None:
    generator = torch.Generator().manual_seed(0)
    query, key, value = torch.randn(3, 2, 3, 5, 8, generator=generator, dtype=torch.float64)
    counts = torch.tensor([1, 4, 2, 1, 3])
    full = attention(
        query, key.repeat_interleave(counts, 2), value.repeat_interleave(counts, 2), None
    )
    bias = counts.double().log()[None, None, None]
    torch.testing.assert_close(attention(query, key, value, bias), full, atol=1e-12, rtol=1e-12)
    with torch.no_grad():  # the fused way
        fused = attention(query, key, value, bias)
    torch.testing.assert_close(fused, full, atol=1e-12, rtol=1e-12)


def test_prefix_is_untouched_and_bias_is_of_sizes() -> None:
    torch.manual_seed(0)
    tokens, keys = torch.randn(2, 5 + 12, 8), torch.randn(2, 2, 17, 4)
    merging = BlockMerging(2, 12, 5, 4, torch.device("cpu"))
    assert merging.key_bias(torch.float32) is None
    after = merging.step(tokens, keys)
    assert after.shape == (2, 5 + 8, 8)
    assert torch.equal(after[:, :5], tokens[:, :5])
    bias = merging.key_bias(torch.float32)
    assert bias is not None and (bias[..., :5] == 0).all()
    torch.testing.assert_close(bias.exp()[:, 0, 0, 5:], merging.sizes)
    sums = (merging.sizes[..., None] * after[:, 5:]).sum(1)
    torch.testing.assert_close(sums, tokens[:, 5:].sum(1))


def test_blocks_compose_and_stop_at_one_token() -> None:
    torch.manual_seed(0)
    tokens = original = torch.randn(1, 2 + 10, 8)
    merging = BlockMerging(1, 10, 2, 7, torch.device("cpu"))
    for _ in range(6):
        tokens = merging.step(tokens, tokens[:, None])
    assert tokens.shape[1] == 3 and merging.sizes.item() == 10
    torch.testing.assert_close(tokens[:, 2], original[:, 2:].mean(1))
    assert (merging.assignment == 0).all()


@pytest.mark.parametrize("grid", [None, (6, 6)])
def test_gradients_are_finite_even_at_zero_tokens(grid: tuple[int, int] | None) -> None:
    features = torch.randn(2, 36, 4)
    features[0, :20] = 0
    features.requires_grad_()
    merged = merge_tokens(features, 7, grid)
    (merged.tokens * torch.randn(2, 7, 4)).sum().backward()
    assert features.grad is not None and features.grad.isfinite().all()
    torch.testing.assert_close(
        torch.autograd.grad(merge_tokens(features, 7, grid).tokens.sum(), features)[0][..., 0],
        1 / unmerge(merged.sizes[..., None], merged.assignment)[..., 0],
    )


@pytest.mark.parametrize("grid", [None, (18, 18)])
def test_bfloat16_is_near_float32(grid: tuple[int, int] | None) -> None:
    features = torch.randn(2, 324, 8).bfloat16()
    half, full = merge_tokens(features, 1, grid), merge_tokens(features.float(), 1, grid)
    assert half.tokens.dtype == torch.bfloat16 and half.sizes.dtype == torch.float32
    assert (half.sizes == 324).all()  # bfloat16 would stop at 256
    torch.testing.assert_close(half.tokens.float(), full.tokens, atol=2e-2, rtol=2e-2)


def test_errors_name_the_way_out() -> None:
    features = torch.zeros(1, 12, 2)
    with pytest.raises(ValueError, match="num_tokens is 0, expected 1 to 12"):
        merge_tokens(features, 0)
    with pytest.raises(ValueError, match="3x5 has 15 cells but there are 12 tokens"):
        merge_tokens(features, 4, (3, 5))
    with pytest.raises(ValueError, match="ask for 0 to 6"):
        match_tokens(features, 7, alternating(12, torch.device("cpu")))
    with pytest.raises(ValueError, match="merge_per_block is -1"):
        BlockMerging(1, 4, 0, -1, torch.device("cpu"))
    with pytest.raises(ValueError, match="assignment"):
        unmerge(features)
