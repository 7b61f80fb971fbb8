"""Spectral reparametrisation, judged by the singular values, by torch and by the fused encoder."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
import yaml
from test_student import DIMS, rms_error
from test_student_options import (
    IMAGES,
    POCKET,
    gradients,
    pocket_size,
    same,
    student_with,
)
from tiny import tiny_config
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from radio.config import to_yaml
from radio.encoder.encoder import Encoder
from radio.encoder.fuse import weights_of
from radio.encoder.layout import materialise_spectral
from radio.files import save_tensors
from radio.targets.standardize import PhiS, save_standardizers
from radio.training.checkpoint import Checkpoint, load_checkpoint, write_sums
from radio.training.regularise import Ema, damp
from student.model import Student
from student.spectral import ALPHA, SpectralWeight, iterate_spectral, spectral_reparametrise

__all__ = ["pocket_size"]  # a fixture of every test here
FACTOR = (".scale", "._u", "._v", "._sn_version")


def trained(steps: int = 3, **options: Any) -> tuple[Student, torch.optim.Optimizer]:
    student = student_with(spectral=True, **options)
    optimizer = torch.optim.AdamW(student.parameters(), 3e-3)
    train(student, optimizer, range(steps))
    return student, optimizer


def train(student: Student, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        iterate_spectral(student)
        gradients(student.train(), seed=step, forwards=2)
        optimizer.step()


def test_the_start_is_the_plain_student() -> None:
    plain, spectral = student_with(layer_scale=0.1), student_with(layer_scale=0.1, spectral=True)
    linears = [(name, m) for name, m in plain.named_modules() if isinstance(m, nn.Linear)]
    plain.eval()
    spectral.eval()
    assert len(linears) == 4 * 4 + 5 * 2 + 1
    for name, linear in linears:
        weight = cast(nn.Linear, spectral.get_submodule(name)).weight
        torch.testing.assert_close(weight, linear.weight, rtol=2e-6, atol=1e-8)
    with torch.no_grad():
        found, expected = spectral(IMAGES), plain(IMAGES)
    for name, output in expected.items():
        assert rms_error(found[name].features, output.features) < 1e-5


def test_keys_are_nvidias() -> None:
    plain, spectral = (
        set(student_with().state_dict()),
        set(student_with(spectral=True).state_dict()),
    )
    linears = {
        name for name, m in student_with().named_modules()
        if isinstance(m, nn.Linear) and "patch_generator" not in name
    }  # fmt: skip
    expected = plain - {f"{name}.weight" for name in linears}
    for name in linears:
        start = f"{name}.parametrizations.weight"
        expected.add(f"{start}.original")
        parts = [f".parts.{i}" for i in range(3)] if name.endswith("attn.qkv") else [""]
        expected |= {f"{start}.0{part}{key}" for part in parts for key in FACTOR}
    assert spectral == expected
    assert "backbone.blocks.3.attn.qkv.parametrizations.weight.0.parts.2._sn_version" in spectral
    assert "adaptors.words.features.final.2.parametrizations.weight.0.scale" in spectral


def test_state_has_upstreams_shapes() -> None:
    state = student_with(spectral=True).state_dict()
    start = "backbone.blocks.0.attn.qkv.parametrizations.weight."
    assert state[f"{start}0.parts.1.scale"].shape == (1, 1)
    assert state[f"{start}0.parts.1._u"].shape == state[f"{start}0.parts.1._v"].shape == (96,)
    assert int(state[f"{start}0.parts.1._sn_version"]) == 2
    assert state[f"{start}original"].shape == (288, 96)


def test_the_factor_is_the_spectral_norm() -> None:
    """At a converged estimate the largest singular value is softplus(scale) + 0.05."""
    torch.manual_seed(0)
    linear = nn.Linear(40, 24)
    nn.init.orthogonal_(linear.weight)
    with torch.no_grad():  # a gap between the first singular value and the others
        linear.weight.add_(2 * F.normalize(torch.randn(24, 1), dim=0) @ torch.randn(1, 40) / 6.3)
    spectral_reparametrise(linear)
    factor = cast(Any, linear).parametrizations.weight[0]
    for value in (-3.0, 0.0, 4.0):
        with torch.no_grad():
            factor.scale.fill_(value)
        norm = torch.linalg.svdvals(linear.weight.detach().double())[0]
        assert float(norm) == pytest.approx(float(F.softplus(torch.tensor(value))) + 0.05, rel=1e-4)


def test_power_iteration_is_torchs() -> None:
    torch.manual_seed(0)
    weight = torch.randn(6, 9)
    theirs = parametrizations.spectral_norm(nn.Linear(9, 6, bias=False), eps=1e-6)
    judge = cast(Any, theirs).parametrizations.weight[0]
    ours = SpectralWeight(weight).train()
    start = F.normalize(torch.randn(6), dim=0), F.normalize(torch.randn(9), dim=0)
    for module in (judge, ours):
        module._u, module._v = (vector.clone() for vector in start)
    norm = float(F.softplus(ours.scale.detach())) + ALPHA
    for _ in range(4):
        ours.iterate(weight)
        expected, found = judge(weight), ours(weight)
        torch.testing.assert_close(ours._u, judge._u)
        torch.testing.assert_close(ours._v, judge._v)
        torch.testing.assert_close(found, expected * norm, rtol=1e-5, atol=1e-6)


def test_vectors_move_in_an_iteration_and_in_no_forward() -> None:
    torch.manual_seed(0)
    linear = nn.Sequential(nn.Linear(7, 5))
    spectral_reparametrise(linear)
    factor = cast(Any, linear[0]).parametrizations.weight[0]
    with torch.no_grad():
        cast(Any, linear[0]).parametrizations.weight.original.add_(torch.randn(5, 7))
    weight = cast(Any, linear[0]).parametrizations.weight.original.detach()
    u, v = factor._u, factor._v
    linear.train()(torch.ones(7))
    assert factor._u is u and factor._v is v
    for _ in range(3):
        u = F.normalize(weight @ v, dim=0)
        v = F.normalize(weight.T @ u, dim=0)
        iterate_spectral(linear)
        torch.testing.assert_close((factor._u, factor._v), (u, v))


def test_the_gradient_is_that_of_the_formula() -> None:
    factor = SpectralWeight(torch.randn(4, 5)).double().eval()
    weight = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(factor, (weight,))
    (gradient,) = torch.autograd.grad(factor(weight).sum(), factor.scale)
    norm = F.softplus(factor.scale.detach()) + ALPHA
    slope = torch.sigmoid(factor.scale.detach())
    expected = factor(weight).detach().sum() / norm * slope
    torch.testing.assert_close(gradient, expected)


def test_gradients_reach_every_weight_and_bfloat16_trains() -> None:
    for autocast in (False, True):
        student = student_with(layer_scale=0.1, spectral=True)
        found = gradients(student, autocast=autocast)
        assert found.keys() == dict(student.named_parameters()).keys()
        for name, value in found.items():
            assert value.isfinite().all(), name
            # The scale's gradient may all but vanish, that of a weight may not.
            assert value.abs().sum() > 0, name


def test_autocast_leaves_the_weight_in_float32() -> None:
    student = student_with(spectral=True).eval()
    linear = cast(Any, student).backbone.blocks[0].mlp.fc1
    expected = linear.weight.detach()
    with torch.autocast("cpu", torch.bfloat16):
        found = linear.weight.detach()
    assert found.dtype == torch.float32 and torch.equal(found, expected)


def test_a_resume_is_exact() -> None:
    """Vectors are in the state: what goes on from a copy is what goes on undisturbed."""
    student, optimizer = trained(2)
    resumed = student_with(spectral=True)
    again = torch.optim.AdamW(resumed.parameters(), 3e-3)
    resumed.load_state_dict(copy.deepcopy(student.state_dict()))
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    start = student.state_dict()["backbone.blocks.0.mlp.fc1.parametrizations.weight.0._u"].clone()
    with torch.no_grad():
        resumed.eval()(IMAGES)  # evaluating moves nothing
    for model, opt in ((student, optimizer), (resumed, again)):
        train(model, opt, range(2, 4))
    same(dict(resumed.state_dict()), dict(student.state_dict()))
    end = student.state_dict()["backbone.blocks.0.mlp.fc1.parametrizations.weight.0._u"]
    assert not torch.equal(start, end)


def test_materialised_weights_are_those_that_the_student_computes_with() -> None:
    student, _ = trained()
    student.eval()
    state = materialise_spectral(student.state_dict())
    plain = student_with()
    plain.load_state_dict(state)
    for name, module in student.named_modules():
        if isinstance(module, nn.Linear):
            torch.testing.assert_close(state[f"{name}.weight"], module.weight, rtol=1e-5, atol=1e-8)
    original = student.state_dict()["backbone.blocks.0.mlp.fc1.parametrizations.weight.original"]
    assert rms_error(state["backbone.blocks.0.mlp.fc1.weight"], original) > 1e-3


def checkpoint_of(student: Student, folder: Path) -> Checkpoint:
    """Return a run's checkpoint, as read from its files, with fitted standardizers."""
    config = tiny_config(folder)
    config.student.size = "pocket"
    standardizers = {}
    for name, dim in DIMS.items():
        rows = torch.randn(200, dim.feature_dim, generator=torch.Generator().manual_seed(1))
        standardizers[name] = PhiS(dim.feature_dim).partial_fit(3 * rows + 2).fit()
    teachers = {name: {"kind": "fake", "fingerprint": "0" * 64} for name in DIMS}
    step = folder / "step-000003"
    step.mkdir()
    save_tensors(dict(student.state_dict()), step / "model.safetensors")
    save_standardizers(step / "standardizers.safetensors", standardizers, {})
    state = {"step": 3, "teachers": teachers, "data": {}}
    (step / "state.yaml").write_text(yaml.safe_dump(state, sort_keys=False))  # CLS rows by order
    (step / "config.yaml").write_text(to_yaml(config))
    write_sums(step)
    return load_checkpoint(step)


@pytest.mark.parametrize("layer_scale", [None, 0.3])
def test_the_fused_encoder_is_the_student_in_eval(
    layer_scale: float | None, tmp_path: Path
) -> None:
    student, _ = trained(layer_scale=layer_scale)
    checkpoint = checkpoint_of(student, tmp_path)
    encoder = Encoder(weights_of(checkpoint))
    assert not any("parametrizations" in key for key in encoder.state_dict())
    with torch.no_grad():
        expected = student.eval()(IMAGES)
        tokens = student.backbone(IMAGES)
    found = encoder.encode(IMAGES, encoder.feature_names)
    assert rms_error(found["features"], tokens.features.flatten(2).transpose(1, 2)) < 1e-5
    for name, output in expected.items():
        predicted = output.features.flatten(2).transpose(1, 2).double()
        features = checkpoint.standardizers[name].inverse_transform(predicted)
        assert rms_error(found[f"{name}:features"].double(), features) < 1e-5, name
        if output.summary is not None:
            assert rms_error(found[f"{name}:summary"], output.summary) < 1e-5, name


@pytest.mark.parametrize("name", ["mlp.fc2", "attn.qkv"])
def test_a_weight_can_be_assigned(name: str) -> None:
    """What a new standardizer does to the last Linear; the parameters stay the same objects."""
    student, _ = trained(1)
    linear = cast(nn.Linear, student.backbone.blocks[1].get_submodule(name))
    before = [id(parameter) for parameter in linear.parameters()]
    weight = torch.randn(linear.weight.shape)
    linear.weight = weight.clone()
    torch.testing.assert_close(linear.eval().weight.detach(), weight, rtol=3e-6, atol=1e-7)
    assert [id(parameter) for parameter in linear.parameters()] == before


def test_it_goes_with_the_moving_average_and_with_damp() -> None:
    student, optimizer = trained(1)
    ema = Ema(student, 0.9)
    with damp(student, 0.1, torch.Generator().manual_seed(0)):
        gradients(student)
    optimizer.step()
    ema.update(student, 100)
    with torch.no_grad():
        averaged = ema.module(IMAGES)["edges"].features
    plain = student_with()
    plain.load_state_dict(materialise_spectral(ema.state_dict()))
    with torch.no_grad():
        assert rms_error(plain.eval()(IMAGES)["edges"].features, averaged) < 1e-5


def test_the_scale_is_two_dimensional_so_that_it_decays() -> None:
    names = [name for name, p in student_with(spectral=True).named_parameters() if p.ndim == 2]
    assert sum(name.endswith(".scale") for name in names) == POCKET.depth * (3 + 3) + 5 * 2
    assert sum(name.endswith(".original") for name in names) == POCKET.depth * 4 + 5 * 2


def test_a_norm_that_cannot_be_is_raised_and_told(caplog: pytest.LogCaptureFixture) -> None:
    linear = nn.Sequential(nn.Linear(3, 4))
    with torch.no_grad():
        linear[0].weight.mul_(1e-3)
    with caplog.at_level(logging.WARNING, "radio.student"):
        spectral_reparametrise(linear)
    assert "the spectral norm of 0 is" in caplog.text and "raised to 0.05" in caplog.text
    norm = torch.linalg.svdvals(linear.eval()[0].weight.detach())[0]
    assert float(norm) == pytest.approx(0.05, rel=1e-2)
    caplog.clear()
    zero = nn.Sequential(nn.Linear(3, 4))
    nn.init.zeros_(zero[0].weight)
    with caplog.at_level(logging.WARNING, "radio.student"):
        spectral_reparametrise(zero)
    assert not caplog.text and (zero(torch.ones(3)) == zero[0].bias).all()
    assert parametrize.is_parametrized(zero[0], "weight")
