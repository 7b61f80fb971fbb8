"""DAMP and the moving average against NumPy, and what they must leave alone."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from radio.training.regularise import Ema, damp, ema_decay


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=seeded(seed))


class Net(nn.Module):
    """Linears between other layers, one of them used twice, and a buffer."""

    steps: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 2)
        self.norm = nn.LayerNorm(6)
        self.inner = nn.Sequential(nn.Linear(6, 6), nn.GELU())
        self.last = nn.Linear(6, 4)
        self.register_buffer("steps", torch.zeros(2))

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.norm(self.conv(images).flatten(2).mT)
        return self.last(self.inner(self.inner(tokens)))


def net(seed: int = 0) -> Net:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Net()


def gradients(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in module.named_parameters() if p.grad is not None}


# DAMP


@pytest.mark.parametrize("std", [0.0, 0.1, 1.5])
def test_damp_follows_its_oracle(std: float) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).double()
    x = normal(5, 3).double()
    generator = seeded(7)
    draws = [torch.randn(4, 3, generator=generator).double().numpy()]
    draws.append(torch.randn(2, 4, generator=generator).double().numpy())
    (w1, b1), (w2, b2) = (
        (layer.weight.detach().numpy(), layer.bias.detach().numpy()) for layer in model
    )
    xi1, xi2 = (1 + std * draw for draw in draws)
    with damp(model, std, seeded(7)):
        output = model(x)
    hidden = x.numpy() @ (w1 * xi1).T + b1
    expected = hidden @ (w2 * xi2).T + b2
    np.testing.assert_allclose(output.detach(), expected, rtol=1e-6, atol=1e-6)
    (output**2 / 2).sum().backward()
    # By hand: g is the gradient at W * xi, and W receives g * xi
    g2 = expected.T @ hidden
    back = expected @ (w2 * xi2)
    g1 = back.T @ x.numpy()
    np.testing.assert_allclose(model[1].weight.grad, g2 * xi2, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(model[1].bias.grad, expected.sum(0), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(model[0].weight.grad, g1 * xi1, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(model[0].bias.grad, back.sum(0), rtol=1e-5, atol=1e-5)


def test_damp_equals_a_copy_with_perturbed_linears() -> None:
    model, images = net(), normal(2, 3, 4, 4)
    copied, generator = copy.deepcopy(model), seeded(3)
    for layer in (copied.inner[0], copied.last):
        factor = 1 + 0.2 * torch.randn(layer.weight.shape, generator=generator)
        with torch.no_grad():
            layer.weight *= factor
    with damp(model, 0.2, seeded(3)):
        assert torch.equal(model(images), copied(images))
        assert torch.equal(model(images), model(images))  # one draw for the whole block
    assert not torch.equal(model(images), copied(images))


def test_no_noise_is_no_change() -> None:
    model, images = net(), normal(2, 3, 4, 4)
    expected = model(images)
    with damp(model, 0.0, seeded()):
        assert torch.equal(model(images), expected)


def test_damp_leaves_parameters_and_state_untouched_inside_and_outside() -> None:
    model = net()
    attributes = {name: set(vars(module)) for name, module in model.named_modules()}
    parameters = list(model.named_parameters())
    state = {name: value.clone() for name, value in model.state_dict().items()}

    def check() -> None:
        assert [name for name, _ in model.named_parameters()] == [name for name, _ in parameters]
        assert all(p is q for p, (_, q) in zip(model.parameters(), parameters, strict=True))
        assert list(model.state_dict()) == list(state)
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())

    with damp(model, 0.5, seeded()):
        check()
        model(normal(1, 3, 4, 4))
    check()
    with pytest.raises(RuntimeError, match="inside"), damp(model, 0.5, seeded()):
        raise RuntimeError("inside")
    check()
    assert attributes == {name: set(vars(module)) for name, module in model.named_modules()}


def test_damp_restores_what_was_there_before_it() -> None:
    model, images = net(), normal(1, 3, 4, 4)
    plain = model(images)
    with damp(model, 0.5, seeded(1)):
        outer = model(images)
        with damp(model.last, 0.5, seeded(2)):
            assert not torch.equal(model(images), outer)
        assert torch.equal(model(images), outer)
    assert torch.equal(model(images), plain)


def test_damp_perturbs_only_what_it_is_given() -> None:
    model, tokens = net(), normal(2, 5, 6)
    inner, last = model.inner(tokens), model.last(tokens)
    with damp(model.inner, 0.5, seeded()):
        assert not torch.equal(model.inner(tokens), inner)
        assert torch.equal(model.last(tokens), last)


def test_damp_is_a_function_of_the_generator() -> None:
    model, images = net(), normal(2, 3, 4, 4)
    outputs = []
    before = torch.get_rng_state()
    for seed in (5, 5, 6):
        with damp(model, 0.1, seeded(seed)):
            outputs.append(model(images))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])


def test_several_passes_and_backwards_share_a_block() -> None:
    model = net()
    parts = [normal(2, 3, 4, 4, seed=seed) for seed in (1, 2)]
    with damp(model, 0.3, seeded()):
        for part in parts:
            model(part).square().sum().backward()
    found = {name: gradient.clone() for name, gradient in gradients(model).items()}
    model.zero_grad()
    with damp(model, 0.3, seeded()):
        loss = sum(model(part).square().sum() for part in parts)
    loss.backward()  # outside of the block
    expected = gradients(model)
    assert found.keys() == expected.keys() == dict(model.named_parameters()).keys()
    for name in found:
        torch.testing.assert_close(found[name], expected[name])


def test_damp_under_autocast_multiplies_in_float32() -> None:
    model, images = net(), normal(2, 3, 4, 4)
    with damp(model, 0.1, seeded()):
        exact = model(images)
        with torch.autocast("cpu", torch.bfloat16):
            found = model(images)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), exact, rtol=0.05, atol=0.03)
    found.float().sum().backward()
    assert model.last.weight.grad is not None
    assert model.last.weight.grad.dtype == torch.float32


def test_the_noise_has_mean_0_and_the_given_deviation() -> None:
    layer = nn.Linear(200, 200, bias=False)
    nn.init.ones_(layer.weight)
    with damp(layer, 0.15, seeded()):
        weight = layer(torch.eye(200))
    assert abs(weight.mean().item() - 1) < 0.005
    assert abs(weight.std().item() - 0.15) < 0.005


# The moving average


def test_the_decay_warms_up_as_in_tensorflow() -> None:
    assert [ema_decay(0.99, step) for step in (0, 8, 90)] == [1 / 10, 9 / 18, 91 / 100]
    assert ema_decay(0.99, 890) == 0.99
    assert ema_decay(0.99, 10**6) == 0.99
    assert ema_decay(0.0, 5) == 0.0


def stepped(module: Net, step: int) -> None:
    """Change a net as a training step would."""
    with torch.no_grad():
        for at, parameter in enumerate(module.parameters()):
            parameter += 0.1 * normal(*parameter.shape, seed=100 * step + at)
        module.steps += 1


@settings(deadline=None, max_examples=10)
@given(decay=st.sampled_from([0.0, 0.5, 0.9, 0.9999]), start=st.integers(0, 2000))
def test_the_average_follows_its_oracle(decay: float, start: int) -> None:
    model = net()
    ema = Ema(model, decay)
    expected = {name: p.detach().double().numpy() for name, p in model.named_parameters()}
    for step in range(start, start + 5):
        stepped(model, step)
        ema.update(model, step)
        d = min(decay, (1 + step) / (10 + step))
        for name, parameter in model.named_parameters():
            now = parameter.detach().double().numpy()
            expected[name] = d * expected[name] + (1 - d) * now
    for name, average in ema.module.named_parameters():
        np.testing.assert_allclose(average, expected[name], rtol=1e-5, atol=1e-6)
    assert torch.equal(ema.module.get_buffer("steps"), model.steps)


def test_the_average_of_an_unchanging_module_is_that_module() -> None:
    model = net()
    ema = Ema(model, 0.9)
    for step in range(5):
        ema.update(model, step)
    state = ema.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_the_average_is_frozen_and_apart() -> None:
    model = net().train()
    ema = Ema(model, 0.9)
    assert model.training
    assert not ema.module.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not any(parameter.requires_grad for parameter in ema.module.parameters())
    before = {name: value.clone() for name, value in ema.state_dict().items()}
    stepped(model, 0)
    assert all(torch.equal(value, before[name]) for name, value in ema.state_dict().items())
    assert not ema.module(normal(1, 3, 4, 4)).requires_grad
    model(normal(1, 3, 4, 4)).sum().backward()
    ema.update(model, 0)
    assert not gradients(ema.module)
    assert all(value.grad_fn is None for value in ema.state_dict().values())


def test_a_resumed_average_goes_on_bit_for_bit() -> None:
    model, other = net(), net()
    whole, first, second = Ema(model, 0.99), Ema(model, 0.99), Ema(other, 0.99)
    for step in range(30):
        stepped(model, step)
        if step == 12:
            second.load_state_dict(load(save(first.state_dict())))
        (first if step < 12 else second).update(model, step)
        whole.update(model, step)
    found, expected = second.state_dict(), whole.state_dict()
    assert list(found) == list(expected) == list(model.state_dict())
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    second.copy_to(other)
    assert all(torch.equal(value, expected[name]) for name, value in other.state_dict().items())


def test_a_state_of_another_module_is_refused() -> None:
    ema = Ema(net(), 0.9)
    state = ema.state_dict()
    del state["last.bias"]
    with pytest.raises(RuntimeError, match=r"last\.bias"):
        ema.load_state_dict(state)


def test_narrow_parameters_are_averaged_in_float32() -> None:
    wide_model = net()
    ema = Ema(copy.deepcopy(wide_model).bfloat16(), 0.999)
    assert all(p.dtype == torch.float32 for p in ema.module.parameters())
    step = 10**6
    start = ema.module.get_parameter("last.bias").clone()
    moved = copy.deepcopy(wide_model).bfloat16()
    with torch.no_grad():
        moved.last.bias += 1
    ema.update(moved, step)
    expected = 0.999 * start + 0.001 * moved.last.bias.float()
    torch.testing.assert_close(ema.module.get_parameter("last.bias"), expected)


def test_timm_is_still_the_judge_after_the_warm_up() -> None:
    model = net()
    ours, theirs = Ema(model, 0.9), ModelEmaV3(model, decay=0.9, exclude_buffers=True)
    for step in range(1000, 1010):
        stepped(model, step)
        ours.update(model, step)
        theirs.update(model, step)
    expected = theirs.module.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in ours.state_dict().items())


def test_damp_and_the_average_do_not_meet() -> None:
    model, images = net(), normal(1, 3, 4, 4)
    ema = Ema(model, 0.9)
    expected = ema.module(images)
    with damp(model, 0.5, seeded()):
        ema.update(model, 0)
        assert torch.equal(ema.module(images), expected)
    ema.update(model, 1)
    assert torch.equal(ema.module(images), expected)
