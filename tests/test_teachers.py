"""Every teacher that ships: dims, sizes, frozenness, fingerprints, and what its cards say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from teachers import Teacher, build_teacher, count_running, kinds
from teachers.base import redraw_constants
from teachers.weights import shipped

CONFIGS = Path(__file__).parents[1] / "configs" / "teacher"
NAMES = sorted(path.stem for path in CONFIGS.glob("*.yaml"))
SMALL = [name for name in NAMES if name.startswith("demo_") or name == "fake"]
# Kinds that ship at full size only, in small, for the same contract.
TINY: dict[str, dict[str, Any]] = {
    "tiny_sam3": {
        "kind": "sam3",
        "options": {
            "image_size": 112,
            "patch_size": 14,
            "width": 64,
            "mlp_width": 128,
            "depth": 4,
            "heads": 2,
            "window_size": 4,
            "global_attention": [1, 3],
            "position_size": 42,
        },
    },
    "tiny_siglip_naflex": {
        "kind": "siglip_naflex",
        "options": {
            "native_size": 96,
            "patch_size": 16,
            "width": 64,
            "mlp_width": 128,
            "depth": 2,
            "heads": 2,
            "position_grid": 4,
        },
    },
}


def described(name: str) -> dict[str, Any]:
    return TINY.get(name) or yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())


def built(name: str, seed: int = 0, **overrides: Any) -> Teacher:
    config = described(name)
    return build_teacher(config["kind"], name, config["options"] | overrides, None, seed)


@pytest.fixture(scope="module", params=[*SMALL, *TINY])
def teacher(request: pytest.FixtureRequest) -> Teacher:
    return built(request.param)


def pixels_for(teacher: Teacher, batch: int = 2, seed: int = 0) -> torch.Tensor:
    side = teacher.native_size
    return torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(seed))


def test_five_small_teachers_ship():
    assert SMALL == ["demo_clip", "demo_dinov2", "demo_sam", "demo_siglip", "fake"]


@pytest.mark.parametrize("name", NAMES)
def test_card_is_what_runs(name: str):
    config = described(name)
    with torch.device("meta"):
        model = build_teacher(config["kind"], name, config["options"], None, 0)
    card = config["card"]
    for key in ("summary_dim", "feature_dim", "stride", "native_size"):
        assert getattr(model, key) == card[key], key
    assert list(model.view_modes) == card["view_modes"]
    parameters, gflops = count_running(model)
    assert parameters == pytest.approx(card["parameters_m"], rel=0.01)
    assert gflops == pytest.approx(card["gflops"], rel=0.01)
    assert config["summary_weight"] == 0 or card["summary_dim"] is not None


def test_output_has_the_card_s_dims(teacher: Teacher):
    output = teacher(pixels_for(teacher))
    grid = teacher.native_size // teacher.stride
    assert output.features.shape == (2, teacher.feature_dim, grid, grid)
    assert output.features.dtype == torch.float32
    if teacher.summary_dim is None:
        assert output.summary is None
    else:
        assert output.summary.shape == (2, teacher.summary_dim)


def test_images_of_a_batch_do_not_mix(teacher: Teacher):
    pixels = pixels_for(teacher, batch=3)
    together, alone = teacher(pixels), teacher(pixels[1:2])
    torch.testing.assert_close(together.features[1:2], alone.features, rtol=1e-4, atol=1e-4)
    if teacher.summary_dim is not None:
        torch.testing.assert_close(together.summary[1:2], alone.summary, rtol=1e-4, atol=1e-4)


def test_frozen_and_in_eval_mode_for_ever(teacher: Teacher):
    teacher.train()
    assert not any(module.training for module in teacher.modules())
    assert not any(weight.requires_grad for weight in teacher.parameters())
    assert {weight.dtype for weight in teacher.parameters()} == {torch.float32}
    pixels = pixels_for(teacher).requires_grad_()
    first, second = teacher(pixels), teacher(pixels)
    assert not first.features.requires_grad
    assert torch.equal(first.features, second.features)


def test_every_channel_varies(teacher: Teacher):
    features = teacher(pixels_for(teacher)).features
    assert features.isfinite().all()
    assert (features.transpose(0, 1).flatten(1).var(1) > 1e-8).all()


def test_the_far_half_of_a_picture_moves_a_token(teacher: Teacher):
    pixels = pixels_for(teacher)
    changed = pixels.clone()
    half = teacher.native_size // 2
    changed[..., half:] = pixels_for(teacher, seed=1)[..., half:]
    before, after = teacher(pixels).features, teacher(changed).features
    deviation = before.transpose(0, 1).flatten(1).var(1).mean().sqrt()
    # Column 0 is a quarter of the picture or more away from every changed pixel.
    moved = (after - before)[..., 0].square().mean(1).sqrt()
    assert moved.mean() >= 0.01 * deviation


# The fake teacher is a projection, which has no positions.
@pytest.mark.parametrize("name", [name for name in (*SMALL, *TINY) if name != "fake"])
def test_positions_matter(name: str):
    teacher = built(name)
    flat = torch.full((1, 3, teacher.native_size, teacher.native_size), 0.5)
    tokens = teacher(flat).features.flatten(2)[0]
    assert (tokens - tokens[:, :1]).abs().max() > 1e-4


def test_no_layer_scale_is_near_zero():
    gammas = [w for key, w in built("demo_dinov2").named_parameters() if key.endswith(".gamma")]
    assert len(gammas) == 12
    assert min(gamma.min() for gamma in gammas) >= 0.5
    assert all(gamma.unique().numel() > 1 for gamma in gammas)


def test_redraw_leaves_norms_alone():
    module = torch.nn.LayerNorm(4)
    redraw_constants(module, 0)
    assert torch.equal(module.weight, torch.ones(4))


@pytest.mark.parametrize("leaf", ["gamma", "gamma_1", "lambda1"])
def test_redraw_draws_every_library_s_layer_scale(leaf: str):
    module = torch.nn.Module()
    module.register_parameter(leaf, torch.nn.Parameter(torch.full((64,), 1e-5)))
    redraw_constants(module, 0)
    drawn = module.get_parameter(leaf)
    assert 0.5 <= drawn.min() < drawn.max() <= 1.5


@pytest.mark.parametrize("leaf", ["pos_embed", "position_embeddings", "rel_pos_h", "cls_token"])
def test_redraw_draws_positions_and_tokens_that_are_zero_and_no_others(leaf: str):
    module = torch.nn.Module()
    module.register_parameter(leaf, torch.nn.Parameter(torch.zeros(1, 64)))
    redraw_constants(module, 0)
    drawn = module.get_parameter(leaf).clone()
    assert 0.01 < drawn.std() < 0.04
    redraw_constants(module, 1)
    assert torch.equal(module.get_parameter(leaf), drawn)


@pytest.mark.parametrize("name", [*SMALL, *TINY])
def test_seed_decides_the_weights_and_nothing_else(name: str):
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first = built(name, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(7)
    again, other = built(name, seed=3), built(name, seed=4)
    assert first.fingerprint == again.fingerprint != other.fingerprint
    assert len(first.fingerprint) == 64


def test_fingerprint_covers_every_weight_and_the_options():
    one = built("fake")
    changed = built("fake")
    with torch.no_grad():
        changed.get_parameter("mix.bias")[-1] += 1e-6
    assert changed.fingerprint != one.fingerprint
    assert built("fake", view_modes=["native"]).fingerprint != one.fingerprint


def test_dinov2_follows_other_grids():
    teacher = built("demo_dinov2")
    assert teacher(torch.randn(1, 3, 112, 84)).features.shape == (1, 192, 8, 6)


@pytest.mark.parametrize("name", ["demo_clip", "demo_siglip", "demo_sam"])
def test_native_teachers_refuse_other_sizes(name: str):
    teacher = built(name)
    with pytest.raises(ValueError, match=f"native {teacher.native_size}"):
        teacher(torch.zeros(1, 3, 64, 64))


def test_sizes_must_be_multiples_of_the_stride():
    with pytest.raises(ValueError, match="multiples of its stride 14"):
        built("demo_dinov2")(torch.zeros(1, 3, 100, 112))


@pytest.mark.parametrize(("dim", "stride"), [(None, 14), (7, 32), (1, 16)])
def test_fake_takes_any_dims(dim: int | None, stride: int):
    teacher = built("fake", summary_dim=dim, feature_dim=3, stride=stride, native_size=4 * stride)
    output = teacher(torch.zeros(2, 3, 2 * stride, 3 * stride))
    assert output.features.shape == (2, 3, 2, 3)
    assert (output.summary is None) == (dim is None)


def test_unknown_kind_lists_the_known():
    known = ["clip", "dinov2", "encoder", "fake", "sam", "sam3", "siglip", "siglip_naflex"]
    assert kinds() == known
    with pytest.raises(ValueError, match=r"unknown kind 'clap'; known kinds: clip, dinov2"):
        build_teacher("clap", "x", {}, None, 0)


def test_unknown_option_is_named():
    with pytest.raises(ValueError, match="'strides'"):
        built("fake", strides=3)
    with pytest.raises(ValueError, match="depht"):
        built("demo_dinov2", depht=3)


@pytest.mark.parametrize("name", ["demo_clip", "demo_dinov2"])
def test_unknown_model_is_named(name: str):
    with pytest.raises(ValueError, match="no model 'nonesuch'"):
        built(name, model="nonesuch")


def test_clip_and_siglip_refuse_each_other_s_towers():
    with pytest.raises(ValueError, match="kind 'siglip'"):
        built("demo_clip", model="demo-map")
    with pytest.raises(ValueError, match="kind 'clip'"):
        built("demo_siglip", model="demo-clip")


DOWNLOADED = [name for name in NAMES if described(name)["pretrained"] and name not in shipped()]


@pytest.mark.parametrize("name", DOWNLOADED)
def test_a_tag_when_offline_says_what_to_download(name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    config = described(name)
    with (
        torch.device("meta"),
        pytest.raises(ValueError, match=r"must be downloaded.*local file's path"),
    ):
        build_teacher(config["kind"], name, config["options"], config["pretrained"], 0)


@pytest.mark.parametrize(
    ("place", "what"),
    [
        ("./gone", r"the folder '\./gone' does not exist; .*radio fuse"),
        ("runs/gone/encoder", r"the folder 'runs/gone/encoder' does not exist"),
        ("owner/model", r"must be downloaded.*model folder 'owner/model', as there is none here"),
    ],
)
def test_an_encoder_folder_that_is_not_there(
    place: str, what: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ValueError, match=what):
        build_teacher("encoder", "old", {"folder": place, "native_size": 64}, None, 0)


@pytest.mark.parametrize(
    "options",
    [{"model": "test_vit2"}, {"model": "test_vit", "class_token": False, "global_pool": "avg"}],
)
def test_a_vit_without_a_class_token_is_no_dinov2(options: dict[str, Any]):
    """Its first token would be a register or a patch, not a summary."""
    with pytest.raises(ValueError, match=rf"timm's '{options['model']}' has no class token"):
        build_teacher("dinov2", "parts", {**options, "native_size": 64}, None, 0)


@pytest.mark.parametrize("name", DOWNLOADED)
def test_unknown_tags_are_named(name: str):
    config = described(name)
    with torch.device("meta"), pytest.raises(ValueError, match=r"no weights 'nonesuch'; tags: \w"):
        build_teacher(config["kind"], name, config["options"], "nonesuch", 0)


def test_fake_ignores_its_native_size():
    teacher = built("fake", view_modes=["native"])
    assert teacher(torch.zeros(1, 3, 32, 32)).features.shape == (1, 8, 2, 2)


def test_fake_has_no_weights_to_load():
    config = described("fake")
    with pytest.raises(ValueError, match="set pretrained to null"):
        build_teacher("fake", "fake", config["options"], "some.pth", 0)
