"""The student against transformers' RadioModel and timm's ViTs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from student import timm_backbone, vit
from student.adaptors import MlpAdaptor
from student.model import Student, TeacherDims, build_student, num_registers_for
from student.timm_backbone import load_timm
from student.vit import SIZES, VisionTransformer, VitShape

SMALL = VitShape(width=96, depth=3, heads=3, mlp_hidden=384)
DIMS = {
    "words": TeacherDims(12, 8),
    "edges": TeacherDims(None, 10),
    "parts": TeacherDims(6, 7),
}


def shaken(module: nn.Module, seed: int = 0) -> nn.Module:
    """Give every weight noise, so that biases, scales and tables all matter."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return module.eval()


def small_vit(**options: int | float | None) -> VisionTransformer:
    settings = {"image_size": 128, "num_cls": 3, "num_registers": 5, **options}
    with torch.random.fork_rng():
        torch.manual_seed(0)  # every call builds the same weights
        model = shaken(VisionTransformer(SMALL, **settings))
    assert isinstance(model, VisionTransformer)
    return model


def rms_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).pow(2).mean().sqrt() / expected.pow(2).mean().sqrt())


@pytest.fixture(scope="module")
def radio_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("radio")
    weights = {}
    for name, value in small_vit().state_dict().items():
        below = "" if name.startswith("input_conditioner") else "model."
        weights[f"radio_model.{below}{name}"] = value.contiguous()
    weights["radio_model.summary_idxs"] = torch.tensor([0, 2])
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    config = {
        "model_type": "radio",
        "architectures": ["RadioModel"],
        "hidden_size": SMALL.width,
        "num_hidden_layers": SMALL.depth,
        "num_attention_heads": SMALL.heads,
        "mlp_ratio": 4.0,
        "patch_size": 16,
        "max_img_size": 128,
        "num_cls_tokens": 3,
        "num_registers": 5,
        "summary_idxs": [0, 2],
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("size", [(128, 128), (64, 96), (96, 64), (48, 112), (176, 144)])
def test_transformers_reads_the_same_model(radio_folder: Path, size: tuple[int, int]) -> None:
    from transformers import AutoModel

    judge, info = AutoModel.from_pretrained(radio_folder, output_loading_info=True)
    assert not info["unexpected_keys"] and not info["mismatched_keys"]
    assert all("layer_scale" in key for key in info["missing_keys"])
    images = torch.rand(2, 3, *size)
    with torch.no_grad():
        expected = judge.eval()(pixel_values=images)
        found = small_vit()(images)
    assert rms_error(found.cls[:, [0, 2]].flatten(1), expected.summary) < 1e-6
    features = found.features.flatten(2).transpose(1, 2)
    assert rms_error(features, expected.features) < 1e-6
    assert features.std() > 0.1


def test_keys_are_nvidias() -> None:
    names = set(small_vit(layer_scale=0.1).state_dict())
    block = [
        f"{part}.{kind}"
        for part in ("norm1", "norm2", "attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
        for kind in ("weight", "bias")
    ]
    expected = {
        "input_conditioner.norm_mean",
        "input_conditioner.norm_std",
        "patch_generator.embedder.weight",
        "patch_generator.pos_embed",
        "patch_generator.cls_token.token",
    } | {f"blocks.{i}.{name}" for i in range(3) for name in [*block, "ls1.gamma", "ls2.gamma"]}
    assert names == expected


@pytest.mark.parametrize(
    "size,image_size,millions",
    [
        ("so400m", 512, 412),
        ("huge", 512, 631),
        ("so400m", 2048, 431),
        ("huge", 2048, 653),
        ("base", 2048, 98.25),
    ],
)
def test_parameter_counts_of_the_published_models(
    size: str, image_size: int, millions: float
) -> None:
    with torch.device("meta"):
        model = VisionTransformer(SIZES[size], image_size=image_size)
    found = sum(p.numel() for p in model.parameters()) / 1e6
    assert abs(found / millions - 1) < 0.005


def test_pixels_go_in_as_channel_row_column() -> None:
    generator = small_vit().patch_generator
    images = torch.rand(1, 3, 32, 48)
    kernel = generator.embedder.weight.reshape(-1, 3, 16, 16)
    expected = nn.functional.conv2d(images, kernel, stride=16).flatten(2).transpose(1, 2)
    torch.testing.assert_close(generator.embedder(generator.patchify(images)), expected)


def test_uint8_and_floats_agree() -> None:
    model = small_vit()
    pixels = torch.randint(0, 256, (2, 3, 32, 64), dtype=torch.uint8)
    with torch.no_grad():
        assert torch.equal(model(pixels).features, model(pixels.float() / 255).features)


@pytest.mark.parametrize("value", [255.0, -1.0, float("nan")])
def test_pixels_out_of_range_are_refused(value: float) -> None:
    images = torch.full((1, 3, 32, 32), value)
    with pytest.raises(ValueError, match=r"expected uint8 or floats in \[0, 1\]"):
        small_vit()(images)


def test_sizes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"40 px.*32 and 48"):
        small_vit()(torch.zeros(1, 3, 32, 40))
    with pytest.raises(ValueError, match="nearest that fit: 16"):
        small_vit()(torch.zeros(1, 3, 8, 16))
    with pytest.raises(ValueError, match=r"100 px.*96 and 112"):
        VisionTransformer(SMALL, image_size=100)
    with pytest.raises(ValueError, match="96 cannot be split among 5 heads"):
        VisionTransformer(VitShape(96, 1, 5, 96))


@pytest.mark.parametrize("merge", [0, 3])
def test_both_attentions_agree(merge: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, images = small_vit().double(), torch.rand(2, 3, 64, 80)
    plain = model(images, merge)
    monkeypatch.setattr(vit, "PLAIN_ATTENTION_MAX_TOKENS", 0)
    fused = model(images, merge)
    torch.testing.assert_close(plain.features, fused.features, atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(plain.cls, fused.cls, atol=1e-9, rtol=1e-9)


def test_positions_are_random_in_training_only() -> None:
    model, images = small_vit(), torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(model(images).features, model(images).features)
        model.train()
        assert not torch.equal(model(images).features, model(images).features)


def test_merging_inside_the_blocks() -> None:
    model, images = small_vit(), torch.rand(2, 3, 64, 80)
    with torch.no_grad():
        plain, merged = model(images), model(images, 4)
        alone = model(images[1:], 4)
    assert merged.features.shape == plain.features.shape == (2, 96, 4, 5)
    distinct = {tuple(column) for column in merged.features[0].flatten(1).T.tolist()}
    assert len(distinct) == 20 - 3 * 4
    assert 0 < rms_error(merged.cls, plain.cls) < 0.5
    torch.testing.assert_close(alone.features, merged.features[1:], atol=1e-5, rtol=1e-5)


def test_merging_identical_patches_changes_nothing() -> None:
    """Equal patches stay equal, and proportional attention counts a merged one for all."""
    model = small_vit().double()
    with torch.no_grad():
        model.patch_generator.pos_embed.copy_(model.patch_generator.pos_embed[:, :1].clone())
        images = torch.full((1, 3, 64, 64), 0.3)
        plain, merged = model(images), model(images, 5)
    torch.testing.assert_close(plain.cls, merged.cls, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(plain.features, merged.features, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("merge", [0, 2])
@pytest.mark.parametrize("layer_scale", [None, 1e-2])
def test_gradients_reach_every_weight(merge: int, layer_scale: float | None) -> None:
    student = tiny_student(layer_scale=layer_scale).train()
    outputs = student(torch.rand(2, 3, 48, 32), merge)
    total = sum(
        output.features.pow(2).mean() + (0 if output.summary is None else output.summary.sum())
        for output in outputs.values()
    )
    assert isinstance(total, torch.Tensor)
    total.backward()
    for name, parameter in student.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().sum() > 0, name


def tiny_student(
    layer_scale: float | None = None, depth: int = 2, hidden: int | None = 32
) -> Student:
    torch.manual_seed(0)
    return build_student(
        size="tiny",
        patch_size=16,
        image_size=64,
        dims=DIMS,
        adaptor_hidden=hidden,
        adaptor_depth=depth,
        layer_scale=layer_scale,
        init=None,
    )


def test_every_teacher_gets_its_shapes_and_its_own_cls_row() -> None:
    student = tiny_student().eval()
    assert student.backbone.num_cls == 2 and student.backbone.num_registers == 6
    images = torch.randint(0, 256, (3, 3, 32, 48), dtype=torch.uint8)
    with torch.no_grad():
        outputs = student(images)
        tokens = student.backbone(images)
        parts = student.adaptors["parts"].summary(tokens.cls[:, 1])
        column = student.adaptors["edges"].features(tokens.features[:, :, 1, 2])
    assert list(outputs) == ["words", "edges", "parts"]
    assert outputs["words"].summary.shape == (3, 12) and outputs["edges"].summary is None
    assert torch.equal(outputs["parts"].summary, parts)
    assert outputs["edges"].features.shape == (3, 10, 2, 3)
    torch.testing.assert_close(outputs["edges"].features[:, :, 1, 2], column)


def test_bfloat16_training_step() -> None:
    student = tiny_student().train()
    with torch.autocast("cpu", torch.bfloat16):
        outputs = student(torch.rand(2, 3, 32, 32), 1)
        sum(output.features.float().pow(2).mean() for output in outputs.values()).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in student.parameters())


def test_adaptors_keys_depth_and_arithmetic() -> None:
    adaptor = shaken(MlpAdaptor(6, 5, 8, depth=3))
    assert isinstance(adaptor, MlpAdaptor)
    parts = ["fc1", "blocks.0.0", "blocks.0.2", "final.0", "final.2"]
    expected = {f"{part}.{kind}" for part in parts for kind in ("weight", "bias")}
    assert set(adaptor.state_dict()) == expected
    assert adaptor.last is adaptor.final[2] and adaptor.last.out_features == 5
    weights, x = adaptor.state_dict(), torch.randn(4, 7, 6)
    linear, norm = nn.functional.linear, nn.functional.layer_norm

    def inner(hidden: torch.Tensor, at: str) -> torch.Tensor:
        scaled = norm(hidden, (8,), weights[f"{at}.0.weight"], weights[f"{at}.0.bias"])
        scaled = nn.functional.gelu(scaled)
        return linear(scaled, weights[f"{at}.2.weight"], weights[f"{at}.2.bias"])

    hidden = linear(x, weights["fc1.weight"], weights["fc1.bias"])
    hidden = hidden + inner(hidden, "blocks.0")
    torch.testing.assert_close(adaptor(x), inner(hidden, "final"))
    linears = [m for m in MlpAdaptor(6, 5).modules() if isinstance(m, nn.Linear)]
    assert len(linears) == 2 and linears[0].out_features == 6
    with pytest.raises(ValueError, match="least is 2"):
        MlpAdaptor(6, 5, 8, depth=1)


def test_weights_at_the_start() -> None:
    model = tiny_student(layer_scale=1e-3).backbone
    assert abs(float(model.blocks[0].attn.qkv.weight.detach().std()) - 0.02) < 1e-3
    assert (model.blocks[0].attn.qkv.bias == 0).all()
    assert abs(float(model.patch_generator.pos_embed.detach().std()) * 192**0.5 - 1) < 0.05
    assert torch.equal(model.blocks[3].ls2.gamma, torch.full((192,), 1e-3))


def test_registers_fill_up_to_eight() -> None:
    assert [num_registers_for(n) for n in (1, 3, 4, 7, 8, 9)] == [7, 5, 4, 1, 8, 7]


def test_students_that_cannot_be() -> None:
    with pytest.raises(ValueError, match=r"'medium' is unknown; known: tiny, small, base"):
        build_student(size="medium", patch_size=16, image_size=64, dims=DIMS)
    with pytest.raises(ValueError, match=r"2 teachers have a summary \(words, parts\).*1 CLS"):
        Student(VisionTransformer(SMALL, num_cls=1), DIMS)


# --- timm ---------------------------------------------------------------------------------------


def timm_vit(**options: object) -> nn.Module:
    settings = {"img_size": 64, "embed_dim": 96, "depth": 3, "num_heads": 3, "num_classes": 0}
    return shaken(timm.models.vision_transformer.VisionTransformer(**{**settings, **options}))


def blocks_output(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """Return timm's tokens before its final norm."""
    model.norm = nn.Identity()
    return model.forward_features(images)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"init_values": 0.3},
        {"reg_tokens": 2},
        {"reg_tokens": 2, "no_embed_class": True},
        {"qkv_bias": False},
    ],
)
@pytest.mark.parametrize("layer_scale", [None, 0.5])
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_a_timm_vit_goes_in_exactly(
    tmp_path: Path, options: dict[str, object], layer_scale: float | None, suffix: str
) -> None:
    theirs = timm_vit(**options)
    path = tmp_path / f"weights{suffix}"
    if suffix == ".pth":
        torch.save({"state_dict": theirs.state_dict()}, path)
    else:
        save_file(theirs.state_dict(), path)
    registers = int(str(options.get("reg_tokens", 0)))
    ours = small_vit(image_size=64, num_cls=1, num_registers=registers, layer_scale=layer_scale)
    mean, std = (0.5, 0.4, 0.6), (0.5, 0.2, 0.3)
    load_timm(ours, path, mean, std)
    images = torch.rand(2, 3, 64, 64)
    normalised = (images - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    with torch.no_grad():
        expected, found = blocks_output(theirs, normalised), ours(images)
    assert rms_error(found.cls[:, 0], expected[:, 0]) < 1e-5
    features = found.features.flatten(2).transpose(1, 2)
    assert rms_error(features, expected[:, 1 + registers :]) < 1e-5


def test_every_cls_row_starts_as_timms(tmp_path: Path) -> None:
    theirs = timm_vit()
    save_file(theirs.state_dict(), tmp_path / "w.safetensors")
    ours = small_vit(image_size=64)
    before = ours.patch_generator.cls_token.token[3:].clone()
    load_timm(ours, tmp_path / "w.safetensors")
    token = ours.patch_generator.cls_token.token
    expected = (theirs.cls_token + theirs.pos_embed[:, :1])[0].expand(3, -1)
    torch.testing.assert_close(token[:3], expected)
    assert torch.equal(token[3:], before)


def test_another_patch_and_table_are_resampled(tmp_path: Path) -> None:
    """A kernel for larger patches answers a smooth picture as the smaller one did."""
    theirs = timm_vit(patch_size=8)
    save_file(theirs.state_dict(), tmp_path / "w.safetensors")
    ours = small_vit(image_size=256)
    load_timm(ours, tmp_path / "w.safetensors", (0.0,) * 3, (1.0,) * 3)
    ramp = torch.linspace(0, 1, 64)
    small = torch.stack([ramp[:, None].expand(-1, 64), ramp.expand(64, -1), ramp[:, None] * ramp])
    large = nn.functional.interpolate(small[None], size=(128, 128), mode="bicubic", antialias=True)
    large = large.clamp(0, 1)
    with torch.no_grad():
        expected = theirs.patch_embed(small[None])
        patches = ours.patch_generator.patchify(ours.input_conditioner(large))
        found = ours.patch_generator.embedder(patches)
        offset = ours.patch_generator.pos_embed.mean(1) - theirs.pos_embed[:, 1:].mean(1)
    assert ours.patch_generator.pos_embed.shape == (1, 256, 96)
    inner = torch.arange(64).reshape(8, 8)[1:-1, 1:-1].flatten()
    assert rms_error((found + offset)[:, inner], expected[:, inner]) < 0.05


def test_a_timm_name_brings_its_own_normalisation(monkeypatch: pytest.MonkeyPatch) -> None:
    real = timm.create_model
    made = []

    def offline(name: str, pretrained: bool) -> nn.Module:
        assert pretrained
        made.append(shaken(real(name, pretrained=False)))
        return made[0]

    monkeypatch.setattr(timm_backbone.timm, "create_model", offline)
    student = build_student(
        size="tiny",
        patch_size=16,
        image_size=224,
        dims=DIMS,
        init="vit_tiny_patch16_224",
    )
    images = torch.rand(1, 3, 224, 224)
    with torch.no_grad():
        expected = made[0].patch_embed((images - 0.5) / 0.5) + made[0].pos_embed[:, 1:]
        found = student.backbone.eval().patch_generator(student.backbone.input_conditioner(images))
    assert rms_error(found[:, 8:], expected) < 1e-5


def test_timm_weights_that_do_not_fit(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    save_file(timm_vit(depth=2).state_dict(), path)
    with pytest.raises(
        ValueError, match=r"width 96, depth 2, MLP 384; the student has width 96, dep"
    ):
        load_timm(small_vit(), path)
    save_file(timm_vit(pre_norm=True).state_dict(), path)
    with pytest.raises(ValueError, match="norm_pre"):
        load_timm(small_vit(), path)
    save_file({"weight": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match="no timm ViT"):
        load_timm(small_vit(), path)
    with pytest.raises(FileNotFoundError, match=r"gone\.safetensors does not exist"):
        load_timm(small_vit(), tmp_path / "gone.safetensors")
    with pytest.raises(ValueError, match="timm cannot load 'vit_of_nobody'"):
        load_timm(small_vit(), "vit_of_nobody")
    torch.save({"model": timm_vit()}, tmp_path / "w.pth")
    with pytest.raises(ValueError, match="more than tensors"):
        load_timm(small_vit(), tmp_path / "w.pth")
