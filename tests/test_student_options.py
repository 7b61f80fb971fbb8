"""Stochastic depth and activation checkpointing: judged by timm and by the run without them."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterable
from typing import Any

import pytest
import timm
import torch
from test_student import DIMS, SMALL, shaken
from timm.layers import DropPath
from torch import nn

from student.depth import drop_path_rates
from student.model import Student, StudentOutput, build_student
from student.vit import SIZES, VisionTransformer, VitShape

IMAGES = torch.rand(3, 3, 64, 96, generator=torch.Generator().manual_seed(1))


POCKET = VitShape(width=96, depth=4, heads=3, mlp_hidden=384)


@pytest.fixture(autouse=True)
def pocket_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give build_student a size of which a test can take many steps."""
    torch.set_num_threads(1)
    monkeypatch.setitem(SIZES, "pocket", POCKET)


def student_with(**options: Any) -> Student:
    """Build a student in training, its weights the same whatever the options."""
    settings: dict[str, Any] = {
        "size": "pocket", "patch_size": 16, "image_size": 128, "dims": DIMS, "adaptor_hidden": 32,
    }  # fmt: skip
    torch.manual_seed(0)
    student = build_student(**settings, **options)
    return student.train()


def loss_of(outputs: dict[str, StudentOutput]) -> torch.Tensor:
    terms = [output.features.float().pow(2).mean() for output in outputs.values()]
    terms += [o.summary.float().sin().mean() for o in outputs.values() if o.summary is not None]
    return torch.stack(terms).sum()


def gradients(
    student: Student, seed: int = 5, forwards: int = 1, autocast: bool = False, **how: Any
) -> dict[str, torch.Tensor]:
    """Return the gradients of one step of `forwards` partitions."""
    torch.manual_seed(seed)
    student.zero_grad(set_to_none=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = torch.stack([loss_of(student(IMAGES, **how)) for _ in range(forwards)]).sum()
    loss.backward()
    return {name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None}


def same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


# off


def digest(tensors: Iterable[torch.Tensor]) -> str:
    whole = hashlib.sha256()
    for tensor in tensors:
        whole.update(tensor.detach().contiguous().numpy().tobytes())
    return whole.hexdigest()


OFF: dict[str, Any] = {
    "drop_path": 0.0,
    "checkpointing": False,
    "spectral": False,
    "num_windowed": None,
    "num_global": 4,
    "adaptor_kind": "mlp",
    "upsample": 1,
}


@pytest.mark.parametrize("merge", [0, 2])
def test_options_that_are_off_leave_every_bit(merge: int) -> None:
    plain, off = student_with(layer_scale=0.1), student_with(layer_scale=0.1, **OFF)
    same(dict(off.state_dict()), dict(plain.state_dict()))
    same(gradients(off, merge_per_block=merge), gradients(plain, merge_per_block=merge))


def test_none_of_them_changes_the_keys_or_the_start() -> None:
    plain = student_with()
    for options in ({"drop_path": 0.3}, {"checkpointing": True}):
        same(dict(student_with(**options).state_dict()), dict(plain.state_dict()))


# stochastic depth


@pytest.mark.parametrize("depth", [1, 2, 12])
def test_rates_grow_as_timms(depth: int) -> None:
    theirs = timm.models.vision_transformer.VisionTransformer(
        img_size=32, embed_dim=12, depth=depth, num_heads=1, num_classes=0, drop_path_rate=0.4
    )
    expected = [
        block.drop_path1.drop_prob if isinstance(block.drop_path1, DropPath) else 0.0
        for block in theirs.blocks
    ]
    assert drop_path_rates(0.4, depth) == pytest.approx(expected)
    for rate in (-0.1, 1.0):
        with pytest.raises(ValueError, match=r"drop_path is .*\(off\).*less than 1"):
            drop_path_rates(rate, depth)


def test_blocks_drop_as_timms_do() -> None:
    """The same weights and the same seed give timm's block the same samples to drop."""
    shaken(model := VisionTransformer(SMALL, image_size=64, layer_scale=0.5, drop_path=0.6))
    ours = model.blocks[-1].train()
    theirs = timm.models.vision_transformer.Block(
        96, 3, qkv_bias=True, init_values=0.5, drop_path=0.6
    ).train()
    theirs.load_state_dict(ours.state_dict())
    tokens = torch.randn(16, 9, 96)
    torch.manual_seed(4)
    expected = theirs(tokens)
    torch.manual_seed(4)
    found = ours(tokens)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    untouched = (expected == tokens).flatten(1).all(1)
    assert 0 < int(untouched.sum()) < 16
    assert torch.equal((found == tokens).flatten(1).all(1), untouched)


def test_a_seed_gives_the_same_drops_and_eval_none() -> None:
    student, plain = student_with(drop_path=0.5), student_with()
    same(gradients(student, seed=3), gradients(student, seed=3))
    first, other = gradients(student, seed=3), gradients(student, seed=4)
    assert not torch.equal(first["backbone.blocks.3.mlp.fc1.weight"],
                           other["backbone.blocks.3.mlp.fc1.weight"])  # fmt: skip
    with torch.no_grad():
        found, expected = student.eval()(IMAGES), plain.eval()(IMAGES)
    for name, output in expected.items():
        assert torch.equal(found[name].features, output.features)


# checkpointing


class Saved:
    """Counts the bytes that a forward keeps for its backward."""

    def __init__(self) -> None:
        self.bytes = 0

    def pack(self, tensor: torch.Tensor) -> torch.Tensor:
        self.bytes += tensor.numel() * tensor.element_size()
        return tensor


def kept_bytes(student: Student) -> int:
    saved = Saved()
    with torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda tensor: tensor):
        student(IMAGES)
    return saved.bytes


def test_checkpointing_keeps_less() -> None:
    assert kept_bytes(student_with(checkpointing=True)) < kept_bytes(student_with()) / 3


@pytest.mark.parametrize("merge", [0, 1])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize(
    "options", [{}, {"drop_path": 0.5}, {"spectral": True}, {"drop_path": 0.5, "spectral": True}]
)
def test_checkpointing_gives_the_same_gradients(
    merge: int, autocast: bool, options: dict[str, Any]
) -> None:
    """Two partitions in one step, so that a block's second run comes after a later first run."""
    plain = student_with(**options)
    twice = student_with(**options, checkpointing=True)
    how: dict[str, Any] = {"forwards": 2, "autocast": autocast, "merge_per_block": merge}
    found = gradients(twice, **how)
    moved = torch.get_rng_state()
    same(found, gradients(plain, **how))
    assert torch.equal(moved, torch.get_rng_state()), "the backward moved the random numbers"
    same(dict(twice.state_dict()), dict(plain.state_dict()))


def test_merging_is_not_done_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """The judge can fail: without a copy of the merging the gradients are others."""
    twice, plain = student_with(checkpointing=True), student_with()
    monkeypatch.setattr("student.depth.copy", type("_", (), {"copy": staticmethod(lambda x: x)}))
    with pytest.raises((AssertionError, RuntimeError)):
        same(gradients(twice, merge_per_block=1), gradients(plain, merge_per_block=1))


def test_a_checkpointed_student_can_be_copied_and_evaluated() -> None:
    student = copy.deepcopy(student_with(checkpointing=True, drop_path=0.2)).eval()
    plain = student_with().eval()
    with torch.no_grad():
        assert torch.equal(student(IMAGES)["edges"].features, plain(IMAGES)["edges"].features)


@pytest.mark.parametrize("option", ["drop_path", "checkpointing"])
@pytest.mark.parametrize("autocast", [False, True])
def test_gradients_reach_every_weight(option: str, autocast: bool) -> None:
    value: Any = {"drop_path": 0.1, "checkpointing": True}[option]
    student = student_with(layer_scale=0.1, **{option: value})
    found = gradients(student, autocast=autocast)
    for name, parameter in student.named_parameters():
        assert isinstance(parameter, nn.Parameter)
        assert found[name].isfinite().all() and found[name].abs().sum() > 0, name
