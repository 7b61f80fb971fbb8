"""Windowed attention against a slow oracle with masks, and upstream's schedule of blocks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_student import SMALL, rms_error, shaken, small_vit
from test_student_options import IMAGES, gradients, pocket_size, same, student_with
from torch import nn

from student.vit import VisionTransformer, VitOutput, VitShape
from student.windows import into_windows, out_of_windows, windowed_blocks

__all__ = ["pocket_size"]  # a fixture of every test here
NUM_PREFIX = 8


def vit(depth: int = 5, **options: Any) -> VisionTransformer:
    shape = VitShape(48, depth, 3, 96)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = VisionTransformer(shape, image_size=128, num_cls=3, num_registers=5, **options)
        shaken(model)
    return model.double()


def attend(attn: nn.Module, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    heads = 3
    qkv = attn.qkv(tokens).unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    mixed = F.scaled_dot_product_attention(qkv[0], qkv[1], qkv[2], attn_mask=mask)
    return attn.proj(mixed.transpose(1, 2).flatten(2))


def oracle(model: VisionTransformer, images: torch.Tensor, window: int) -> VitOutput:
    """Stay in raster order; windowed blocks mask every pair but patches of one window."""
    rows, columns = (side // 16 for side in images.shape[-2:])
    tokens = model.patch_generator(model.input_conditioner(images).double())
    names = [(y // window, x // window) for y in range(rows) for x in range(columns)]
    together = torch.tensor([[a == b for b in names] for a in names])
    everything = torch.ones(NUM_PREFIX + len(names), NUM_PREFIX + len(names), dtype=torch.bool)
    for block, windowed in zip(model.blocks, model.is_windowed, strict=True):
        part = tokens[:, NUM_PREFIX:] if windowed else tokens
        part = part + attend(block.attn, block.norm1(part), together if windowed else everything)
        part = part + block.mlp(block.norm2(part))
        tokens = torch.cat([tokens[:, :NUM_PREFIX], part], dim=1) if windowed else part
    patches = tokens[:, NUM_PREFIX:].transpose(1, 2).unflatten(2, (rows, columns))
    return VitOutput(tokens[:, :3], tokens[:, 3:NUM_PREFIX], patches)


# the schedule


def upstreams(depth: int, num_windowed: int | None, num_global: int | None) -> list[bool]:
    """The hooks that vitdet.py registers, run as a state machine."""
    period = num_windowed + 1 if num_windowed is not None else max(depth // (num_global or 4), 1)
    hooks: list[bool | None] = [None] * depth
    is_global = True
    for i in range(depth - 1):
        if i % period == 0:
            hooks[i], is_global = True, False
        elif i % period == period - 1:
            hooks[i], is_global = False, True
    if not is_global:
        hooks[-1] = False
    windowed, state = [], False
    for hook in hooks:
        state = state if hook is None else hook
        windowed.append(state)
    return windowed


@pytest.mark.parametrize("depth", [8, 12, 24, 27, 32])
@pytest.mark.parametrize("num_windowed", [None, 1, 2, 5])
@pytest.mark.parametrize("num_global", [1, 2, 4])
def test_blocks_alternate_as_upstreams(
    depth: int, num_windowed: int | None, num_global: int
) -> None:
    found = windowed_blocks(depth, num_windowed, num_global)
    assert found == upstreams(depth, num_windowed, num_global)
    assert not found[-1] and any(found)


def test_schedules_by_hand() -> None:
    w, g = True, False
    assert windowed_blocks(12, None, 4) == [w, w, g] * 4
    assert windowed_blocks(12, 5, 4) == [w, w, w, w, w, g] * 2
    assert windowed_blocks(5, 3, 4) == [w, w, w, g, g]
    assert windowed_blocks(4, None, 4) == windowed_blocks(4, 0, 4) == [g] * 4
    for counts in ((None, 0), (-1, 4)):
        with pytest.raises(ValueError, match=r"num_windowed is .* and num_global .*at least"):
            windowed_blocks(12, *counts)


# the order


def test_patches_go_window_by_window_and_back() -> None:
    names = torch.tensor([[[float(10 * y + x)] for y in range(4) for x in range(6)]])
    found = into_windows(names, (4, 6), 2)
    assert found[0, :, 0].tolist() == [
        0, 1, 10, 11, 2, 3, 12, 13, 4, 5, 14, 15, 20, 21, 30, 31, 22, 23, 32, 33, 24, 25, 34, 35,
    ]  # fmt: skip
    assert torch.equal(out_of_windows(found, (4, 6), 2), names)


# the numbers


@pytest.mark.parametrize("size", [(64, 64), (64, 128), (192, 64)])
@pytest.mark.parametrize("window", [1, 2, 4])
@pytest.mark.parametrize("counts", [{"num_windowed": 2}, {"num_global": 2}, {"num_global": 1}])
def test_windows_are_a_masked_attention(
    size: tuple[int, int], window: int, counts: dict[str, int]
) -> None:
    model, images = vit(**counts), torch.rand(2, 3, *size)
    with torch.no_grad():
        found, expected = model(images, window=window), oracle(model, images, window)
        plain = model(images)
    for part in ("cls", "registers", "features"):
        assert rms_error(getattr(found, part), getattr(expected, part)) < 1e-12, part
    assert rms_error(plain.features, expected.features) > 1e-3


def test_one_window_over_the_whole_grid_only_sets_the_prefix_aside() -> None:
    model, images = vit(num_global=1), torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        tokens = model.patch_generator(model.input_conditioner(images).double())
        prefix, patches = tokens[:, :NUM_PREFIX], tokens[:, NUM_PREFIX:]
        for block in model.blocks[:-1]:
            patches = block(patches)
        expected = model.blocks[-1](torch.cat([prefix, patches], dim=1))
        found = model(images, window=4)
    assert rms_error(found.features.flatten(2).transpose(1, 2), expected[:, NUM_PREFIX:]) < 1e-12
    assert rms_error(found.cls, expected[:, :3]) < 1e-12


def test_without_windowed_blocks_nothing_changes() -> None:
    model, images = vit(num_windowed=0), torch.rand(2, 3, 64, 96)
    with torch.no_grad():
        found, expected = model(images, window=2), model(images)
    assert rms_error(found.features, expected.features) < 1e-12


# in training


def test_a_window_of_none_is_off() -> None:
    plain, off = student_with(), student_with(num_windowed=2, num_global=1)
    same(dict(off.state_dict()), dict(plain.state_dict()))
    same(gradients(off, window=None), gradients(plain))


WINDOW = 2  # of a grid of 4 x 6


@pytest.mark.parametrize("autocast", [False, True])
def test_gradients_reach_every_weight(autocast: bool) -> None:
    student = student_with(num_windowed=1, layer_scale=0.1)
    found = gradients(student, autocast=autocast, window=WINDOW)
    for name, _ in student.named_parameters():
        assert found[name].isfinite().all() and found[name].abs().sum() > 0, name


def test_checkpointing_spectral_and_drop_path_go_with_windows() -> None:
    options: dict[str, Any] = {"num_windowed": 1, "drop_path": 0.5, "spectral": True}
    plain, twice = student_with(**options), student_with(**options, checkpointing=True)
    how: dict[str, Any] = {"window": WINDOW, "forwards": 2}
    same(gradients(twice, **how), gradients(plain, **how))


def test_a_dropped_sample_is_dropped_in_all_its_windows() -> None:
    model = VisionTransformer(SMALL, image_size=64, drop_path=0.9, num_windowed=2)
    shaken(model)
    block = model.blocks[1].train()
    tokens = torch.randn(32, 16, 96)
    torch.manual_seed(0)
    changed = (block(tokens, None, 4) != tokens).any(-1)
    assert torch.equal(changed, changed[:, :1].expand_as(changed))
    assert 0 < int(changed[:, 0].sum()) < 32


# refusals


def test_windows_that_do_not_fit_are_refused() -> None:
    model = small_vit()
    with pytest.raises(ValueError, match=r"80 px is 5 patches.*window of 4.*fit: 64 and 128 px"):
        model(torch.zeros(1, 3, 64, 80), window=4)
    with pytest.raises(ValueError, match=r"32 px is 2 patches.*window of 3; .*fit: 48 px"):
        model(torch.zeros(1, 3, 32, 48), window=3)
    with pytest.raises(ValueError, match="window is 0 patches a side, expected 1 or more"):
        model(torch.zeros(1, 3, 64, 64), window=0)


def test_windows_and_merging_exclude_each_other() -> None:
    with pytest.raises(ValueError, match="window=2 and merge_per_block=3 exclude each other"):
        student_with()(IMAGES, merge_per_block=3, window=2)
