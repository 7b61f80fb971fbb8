"""Key maps and folds between our backbone, NVIDIA's files and RadioModel."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from test_student import small_vit
from torch import nn
from torch.nn.utils import parametrize

from radio.encoder import layout
from radio.encoder.layout import head_problem
from radio.errors import RadioError
from student.adaptors import MlpAdaptor
from student.radio_layout import (
    LAYER_SCALE_KEY,
    SUMMARY_ROWS,
    below,
    clean_backbone,
    fold_layer_scale,
    from_disk,
    materialise_spectral,
    to_disk,
)

State = dict[str, torch.Tensor]


def same(found: State, expected: State) -> None:
    assert set(found) == set(expected)
    for key, value in expected.items():
        assert torch.equal(found[key], value), key


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# names


def test_below_takes_no_name_that_only_begins_alike() -> None:
    state = {f"_heads.{name}.fc1.bias": random(1) for name in ("1", "10", "clip", "clip2", "a.1")}
    assert list(below(state, "_heads.1.")) == ["fc1.bias"]
    assert below(state, "_heads.1.")["fc1.bias"] is state["_heads.1.fc1.bias"]
    assert list(below(state, "_heads.clip.")) == ["fc1.bias"]
    assert below(state, "heads.") == {}
    with pytest.raises(AssertionError):
        below(state, "_heads.1")


def test_a_prefix_is_cut_once() -> None:
    assert list(below({"a.a.b": random(1)}, "a.")) == ["a.b"]


def test_disk_and_back_is_the_same_backbone() -> None:
    state = small_vit().state_dict()
    disk = to_disk(state, [0, 2])
    assert disk[SUMMARY_ROWS].tolist() == [0, 2] and disk[SUMMARY_ROWS].dtype == torch.int64
    assert "radio_model.input_conditioner.norm_mean" in disk
    assert "radio_model.model.blocks.2.attn.qkv.weight" in disk
    assert len(disk) == len(state) + 1
    same(from_disk(disk), state)


def test_what_goes_to_disk_shares_no_memory() -> None:
    state = {"blocks.0.norm1.weight": random(8, 4).T[0]}
    disk = to_disk(state, [0])
    value = disk["radio_model.model.blocks.0.norm1.weight"]
    assert value.is_contiguous() and value.data_ptr() != state["blocks.0.norm1.weight"].data_ptr()


def test_heads_and_dead_weights_are_left_out() -> None:
    state = small_vit().state_dict()
    disk = to_disk(state, [0])
    disk |= {
        "radio_model.adaptors.clip.head_mlp.fc1.weight": random(2, 2),
        "radio_model.model.reg_token": random(1),
        "radio_model.model.patch_generator.video_embedder.weight": random(2, 2),
    }
    same(from_disk(disk), state)


def test_normalisation_of_any_shape_becomes_three_by_one_by_one() -> None:
    state = small_vit().state_dict()
    flat = {**state, "input_conditioner.norm_mean": random(3)}
    assert clean_backbone(flat)["input_conditioner.norm_mean"].shape == (3, 1, 1)


@pytest.mark.parametrize(
    ("key", "what"),
    [
        ("norm.weight", "a final norm"),
        ("blocks.0.mlp.norm.weight", "a norm inside the MLP"),
        ("blocks.0.mlp.w12.weight", "DINOv2-like"),
        ("patch_generator.embedder.bias", "DINOv2-like"),
        ("inner.blocks.0.norm1.weight", "DINOv2-like"),
        ("levels.0.weight", "E-RADIO"),
        ("blocks.0.attn.q_norm.weight", "unknown parts"),
        ("reg_token.more", "unknown parts"),
    ],
)
def test_a_backbone_that_we_cannot_hold_is_named(key: str, what: str) -> None:
    state = {**small_vit().state_dict(), key: random(1)}
    with pytest.raises(ValueError, match=rf"{what}.*'{key}'"):
        clean_backbone(state)
    with pytest.raises(RadioError, match=rf"{what}.*'{key}'"):
        layout.clean_backbone(state)


# LayerScale


def scaled_states() -> tuple[State, State]:
    """Return a LayerScale backbone's state and the float64 oracle of its fold."""
    model = small_vit(layer_scale=0.3)
    state = model.state_dict()
    oracle = {k: v.double() for k, v in state.items() if ".ls" not in k}
    for number in range(3):
        for scale, branch in (("ls1", "attn.proj"), ("ls2", "mlp.fc2")):
            gamma = state[f"blocks.{number}.{scale}.gamma"].double()
            oracle[f"blocks.{number}.{branch}.weight"] *= gamma[:, None]
            oracle[f"blocks.{number}.{branch}.bias"] *= gamma
    return state, oracle


SPELLINGS = ["ls{}.gamma", "ls{}.grandma", "layer_scale{}.lambda1"]


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_layer_scale_folds_under_each_of_its_names(spelling: str) -> None:
    state, oracle = scaled_states()
    renamed = {
        key.replace("ls1.gamma", spelling.format(1)).replace("ls2.gamma", spelling.format(2)): v
        for key, v in state.items()
    }
    assert sum(LAYER_SCALE_KEY.fullmatch(key) is not None for key in renamed) == 6
    folded = clean_backbone(renamed)
    assert set(folded) == set(oracle)
    for key, value in oracle.items():
        assert torch.equal(folded[key], value.float()), key
    kept = renamed.keys() - folded.keys()
    assert len(kept) == 6 and fold_layer_scale(folded).keys() == folded.keys()


def test_the_folded_backbone_computes_the_same() -> None:
    scaled = small_vit(layer_scale=0.3)
    plain = small_vit()
    plain.load_state_dict(clean_backbone(scaled.state_dict()))
    images = torch.rand(2, 3, 64, 48)
    with torch.no_grad():
        found, expected = plain(images), scaled(images)
    torch.testing.assert_close(found.features, expected.features, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.cls, expected.cls, rtol=1e-5, atol=1e-5)


def test_folding_half_precision_files_does_not_underflow() -> None:
    """1e-4 * 1e-4 is 0 in float16, so the file's numbers are widened before the product."""
    state, _ = scaled_states()
    state["blocks.0.ls1.gamma"].fill_(1e-4)
    state["blocks.0.attn.proj.weight"].fill_(1e-4)
    folded = clean_backbone({key: value.half() for key, value in state.items()})
    found = folded["blocks.0.attn.proj.weight"]
    expected = torch.full_like(found, float(torch.tensor(1e-4).half()) ** 2)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    assert all(value.dtype == torch.float32 for value in folded.values())


# spectral reparametrisation, judged by torch's own parametrizations


class Reweight(nn.Module):
    """W s / sigma with sigma = u^T W v + eps, as upstream's module of either version."""

    def __init__(self, weight: torch.Tensor, seed: int, version: int, eps: float) -> None:
        super().__init__()
        self.version, self.eps = version, eps
        if version == 2:
            self.register_buffer("_sn_version", torch.tensor(2))
        right = F.normalize(random(weight.shape[1], seed=seed), dim=0)
        self.register_buffer("_u", F.normalize(weight @ right, dim=0))
        self.register_buffer("_v", right)
        self.scale = nn.Parameter(torch.tensor([[0.7 + 0.1 * seed]]))

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        sigma = torch.dot(self._u, torch.mv(weight, self._v)) + self.eps
        scale = F.softplus(self.scale) + 0.05 if self.version == 2 else self.scale
        return weight * (scale / sigma)


class Parts(nn.Module):
    """Upstream's qkv: one factor per part, the values' may be missing."""

    def __init__(self, weight: torch.Tensor, renorm_values: bool, eps: float) -> None:
        super().__init__()
        parts = [Reweight(part, 3 * i, 2, eps) for i, part in enumerate(weight.chunk(3))]
        self.parts = nn.ModuleList(parts if renorm_values else [*parts[:2], nn.Identity()])

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        cut = zip(self.parts, weight.chunk(3), strict=True)
        return torch.cat([factor(part) for factor, part in cut])


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("eps", [1e-6, 0.3])
def test_spectral_weights_become_what_they_compute(version: int, eps: float) -> None:
    linear = nn.Linear(5, 6)
    parametrize.register_parametrization(
        linear, "weight", Reweight(linear.weight.detach(), 1, version, eps)
    )
    state = {f"fc1.{key}": value for key, value in linear.state_dict().items()}
    plain = materialise_spectral(state, eps)
    assert set(plain) == {"fc1.weight", "fc1.bias"}
    torch.testing.assert_close(plain["fc1.weight"], linear.weight.detach())
    assert torch.equal(plain["fc1.bias"], linear.bias)


@pytest.mark.parametrize("renorm_values", [True, False])
def test_spectral_qkv_has_a_factor_per_part(renorm_values: bool) -> None:
    linear = nn.Linear(4, 12)
    parametrize.register_parametrization(
        linear, "weight", Parts(linear.weight.detach(), renorm_values, 1e-6)
    )
    key = "blocks.0.attn.qkv"
    state = {f"{key}.{name}": value for name, value in linear.state_dict().items()}
    plain = materialise_spectral(state)
    torch.testing.assert_close(plain[f"{key}.weight"], linear.weight.detach())
    original = state[f"{key}.parametrizations.weight.original"]
    assert torch.equal(plain[f"{key}.weight"][8:], original[8:]) is not renorm_values


def spectral(scale: torch.Tensor, **extra: torch.Tensor) -> State:
    weight = random(4, 4, seed=4)
    factor = {"scale": scale, "_u": random(4, seed=5), "_v": random(4, seed=6), **extra}
    prefix = "fc1.parametrizations.weight."
    return {f"{prefix}original": weight, **{f"{prefix}0.{k}": v for k, v in factor.items()}}


def test_a_scale_that_was_padded_counts_by_its_first_column() -> None:
    padded = materialise_spectral(spectral(torch.tensor([[0.4, 9.0, 9.0, 9.0]])))
    plain = materialise_spectral(spectral(torch.tensor([[0.4]])))
    assert torch.equal(padded["fc1.weight"], plain["fc1.weight"])


def test_an_unknown_spectral_version_is_refused() -> None:
    state = spectral(torch.ones(1, 1), _sn_version=torch.tensor(3))
    with pytest.raises(ValueError, match="version 3 is unknown"):
        materialise_spectral(state)
    with pytest.raises(RadioError, match="version 3 is unknown"):
        layout.materialise_spectral(state)


def test_noise_parametrizations_leave_the_weight() -> None:
    state = {"fc1.parametrizations.weight.original": random(2, 3), "fc1.bias": random(2)}
    plain = materialise_spectral(state)
    assert torch.equal(plain["fc1.weight"], random(2, 3))
    assert set(plain) == {"fc1.weight", "fc1.bias"}
    assert materialise_spectral({"a.weight": state["fc1.bias"]}).keys() == {"a.weight"}


# heads


def test_only_plain_heads_of_version_2_can_be_held() -> None:
    version_2 = MlpAdaptor(4, 3, 5, 3).state_dict()
    assert head_problem(version_2) is None
    within = {f"mlp.{key}": value for key, value in version_2.items()}
    for state, why in (
        (within, "attention"),
        ({**version_2, "pre_norm.0.weight": random(4)}, "begins with a norm"),
        ({"fc1.weight": random(5, 4), "norm.weight": random(5), "fc2.weight": random(3, 5)}, "v"),
        ({"fc1.weight": random(5, 4)}, "unknown"),
    ):
        problem = head_problem(state)
        assert problem is not None and why in problem
