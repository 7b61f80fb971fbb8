"""Attention adaptors and upsampling: judged by timm's blocks, an oracle of upstream, the fold."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from small_encoder import photographs, small_weights, write_small
from test_spectral import checkpoint_of
from test_student import DIMS, rms_error, shaken
from test_student_options import IMAGES, gradients, pocket_size, same, student_with
from timm.models.vision_transformer import Block
from torch import nn

import radio
from radio.encoder.card import model_card
from radio.encoder.encoder import Encoder
from radio.encoder.folder import config_of, write_folder
from radio.encoder.fuse import weights_of
from radio.encoder.layout import head_problem
from radio.encoder.weights import TeacherHeads
from radio.errors import RadioError
from student.adaptors import AttentionAdaptor, MlpAdaptor, upsampled
from student.model import by_teacher
from student.vit import VisionTransformer, VitShape

__all__ = ["pocket_size"]  # a fixture of every test here
EVERYTHING = {"adaptor_kind": "attention", "upsample": 2}


class UpstreamHead(nn.Module):
    """NVIDIA's AttnFDHead as its file spells it: two of timm's blocks, then MLP2 without inner."""

    def __init__(self, width: int, hidden: int, out: int) -> None:
        super().__init__()
        self.blocks = nn.Sequential(
            *[Block(width, num_heads=16, init_values=1e-5) for _ in range(2)]
        )
        self.mlp = nn.Module()
        self.mlp.fc1 = nn.Linear(width, hidden)
        self.mlp.final = nn.Sequential(nn.LayerNorm(hidden), nn.GELU(), nn.Linear(hidden, out))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.mlp.final(self.mlp.fc1(self.blocks(x)))


def spread(x: torch.Tensor, h: int, w: int, u: int) -> torch.Tensor:
    """`b (h w) (u1 u2 c) -> b (h u1 w u2) c`, position by position."""
    c = x.shape[-1] // u**2
    out = torch.zeros(len(x), h * u, w * u, c)
    for y in range(h * u):
        for z in range(w * u):
            group = (y % u) * u + z % u
            out[:, y, z] = x[:, (y // u) * w + z // u, group * c : (group + 1) * c]
    return out.flatten(1, 2)


# the attention head


def test_an_attention_adaptor_is_upstreams() -> None:
    theirs = UpstreamHead(96, 24, 7)
    shaken(theirs)
    ours = AttentionAdaptor(96, 7, 24).eval()
    ours.load_state_dict(theirs.state_dict())  # strict: the same keys and shapes
    tokens = torch.randn(2, 12, 96)
    with torch.no_grad():
        expected = theirs(tokens)
        assert rms_error(ours(tokens), expected) < 1e-6
        assert rms_error(ours(tokens.unflatten(1, (3, 4))).flatten(1, 2), expected) < 1e-6
        alone = ours(tokens[:, :5])
    assert rms_error(alone, expected[:, :5]) > 1e-3, "the tokens do not see one another"
    assert ours.last is ours.mlp.final[2] and ours.last.out_features == 7


def test_its_keys_and_its_start() -> None:
    torch.manual_seed(0)
    adaptor = AttentionAdaptor(96, 7)
    block = [
        f"{part}.{kind}"
        for part in ("norm1", "norm2", "attn.proj", "mlp.fc1", "mlp.fc2")
        for kind in ("weight", "bias")
    ]
    block += ["attn.qkv.weight", "ls1.gamma", "ls2.gamma"]
    mlp = [f"mlp.{part}.{kind}" for part in ("fc1", "final.0", "final.2")
           for kind in ("weight", "bias")]  # fmt: skip
    assert set(adaptor.state_dict()) == {f"blocks.{i}.{key}" for i in (0, 1) for key in block} | {
        *mlp
    }
    assert torch.equal(adaptor.blocks[1].ls2.gamma, torch.full((96,), 1e-5))
    assert abs(float(adaptor.blocks[0].attn.qkv.weight.detach().std()) - 0.02) < 1e-3
    with pytest.raises(ValueError, match=r"16 heads.*width of 100; .*fit: 96 and 112"):
        AttentionAdaptor(100, 7)


# upsampling


@pytest.mark.parametrize("factor", [1, 2, 3])
def test_upsampling_is_upstreams(factor: int) -> None:
    outputs = torch.randn(2, 3, 4, 5 * factor**2)
    found = upsampled(outputs, factor)
    assert found.shape == (2, 3 * factor, 4 * factor, 5)
    assert torch.equal(found.flatten(1, 2), spread(outputs.flatten(1, 2), 3, 4, factor))
    assert (found is outputs) is (factor == 1)


# in the student


@pytest.mark.parametrize("kind", ["mlp", "attention"])
def test_a_student_gives_finer_features(kind: str) -> None:
    student = student_with(adaptor_kind=kind, upsample=2).eval()
    with torch.no_grad():
        outputs, tokens = student(IMAGES), student.backbone(IMAGES)
        patches = tokens.features.flatten(2).transpose(1, 2)
        expected = spread(student.adaptors["edges"].features(patches), 4, 6, 2)
    assert outputs["edges"].features.shape == (3, 10, 8, 12)
    found = outputs["edges"].features.flatten(2).transpose(1, 2)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert outputs["words"].summary.shape == (3, 12)
    assert isinstance(student.adaptors["words"].summary, MlpAdaptor)


def test_values_by_teacher() -> None:
    student = student_with(adaptor_kind={"words": "attention"}, upsample={"edges": 3})
    kinds = {name: type(adaptor.features) for name, adaptor in student.adaptors.items()}
    assert kinds == {"words": AttentionAdaptor, "edges": MlpAdaptor, "parts": MlpAdaptor}
    shapes = {name: tuple(output.features.shape[1:]) for name, output in student(IMAGES).items()}
    assert shapes == {"words": (8, 4, 6), "edges": (10, 12, 18), "parts": (7, 4, 6)}
    assert by_teacher("upsample", 2, DIMS, 1) == dict.fromkeys(DIMS, 2)


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match=r"kind 'conv' is unknown; known: mlp, attention"):
        student_with(adaptor_kind="conv")
    with pytest.raises(ValueError, match=r"upsample is 0, expected 1 \(off\) or more"):
        student_with(upsample=0)
    with pytest.raises(ValueError, match=r"adaptor_kind names wrds.*known: words, edges, parts"):
        student_with(adaptor_kind={"wrds": "attention"})


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("spectral", [False, True])
def test_gradients_reach_every_weight(autocast: bool, spectral: bool) -> None:
    student = student_with(**EVERYTHING, spectral=spectral)
    with torch.no_grad():  # at 1e-5 what passes through the blocks is lost in bfloat16
        for name, parameter in student.named_parameters():
            if name.endswith(".gamma"):
                parameter.fill_(0.5)
    found = gradients(student, autocast=autocast)
    for name, _ in student.named_parameters():
        assert found[name].isfinite().all() and found[name].abs().sum() > 0, name


def test_checkpointing_goes_with_attention_adaptors() -> None:
    plain, twice = student_with(**EVERYTHING), student_with(**EVERYTHING, checkpointing=True)
    same(gradients(twice), gradients(plain))


# fused


@pytest.mark.parametrize(
    "options",
    [
        {"adaptor_kind": "attention"},
        {"upsample": 2},
        {"upsample": {"edges": 3}, "adaptor_kind": {"edges": "attention"}, "spectral": True},
    ],
)
def test_a_fused_encoder_gives_the_teachers_own_space(
    options: dict[str, Any], tmp_path: Path
) -> None:
    student = student_with(**options)
    shaken(student)  # LayerScale and biases matter
    checkpoint = checkpoint_of(student, tmp_path)
    weights = weights_of(checkpoint)
    write_folder(weights, model_card(weights), tmp_path / "encoder")
    encoder = radio.load(tmp_path / "encoder")
    with torch.no_grad():
        expected = student(IMAGES)
    for name, output in expected.items():
        predicted = output.features.flatten(2).transpose(1, 2).double()
        found = encoder.encode(IMAGES, f"{name}:features")[f"{name}:features"]
        own = checkpoint.standardizers[name].inverse_transform(predicted)
        assert rms_error(found.double(), own) < 1e-5, name
        assert rms_error(predicted, own) > 0.1, "the standardizer does nothing"
        assert encoder.feature_dims[f"{name}:features"] == DIMS[name].feature_dim
    assert Encoder(weights).fingerprint == encoder.fingerprint
    again = radio.fuse(tmp_path / "encoder", tmp_path / "again")
    assert radio.load(again).fingerprint == encoder.fingerprint


def test_the_folder_says_how_fine_the_features_are(tmp_path: Path) -> None:
    weights = weights_of(checkpoint_of(student_with(upsample={"edges": 2}), tmp_path))
    write_folder(weights, model_card(weights), tmp_path / "encoder")
    blocks = json.loads((tmp_path / "encoder" / "config.json").read_text())["adaptors"]
    assert blocks["edges"]["upsample"] == 2 and blocks["edges"]["feature_dim"] == 10
    assert "upsample" not in blocks["words"]
    encoder = radio.load(tmp_path / "encoder")
    with pytest.raises(RadioError, match="'edges:features' has 2 x 2 positions of each patch"):
        encoder.encode(IMAGES, "edges:features", merge_to=6)
    assert encoder.encode(IMAGES, "words:features", merge_to=6)["words:features"].shape[1] == 6


# NVIDIA's files


def attention_state(out: int = 5, width: int = 96) -> dict[str, torch.Tensor]:
    head = UpstreamHead(width, 16, out)
    shaken(head)
    return head.state_dict()


def test_an_attention_head_of_nvidias_file_is_read(tmp_path: Path) -> None:
    torch.manual_seed(0)
    shape = VitShape(192, 2, 3, 384)
    model = VisionTransformer(shape, image_size=64, num_cls=2, num_registers=6)
    shaken(model)
    state = {f"base_model.{key}": value for key, value in model.state_dict().items()
             if not key.startswith("input_conditioner.")}  # fmt: skip
    state |= {k: v for k, v in model.state_dict().items() if k.startswith("input_conditioner.")}
    head = UpstreamHead(192, 16, 5)
    shaken(head)
    state |= {f"_feature_projections.sam3.{key}": v for key, v in head.state_dict().items()}
    teachers = [{"name": name, "type": name, "model": "m"} for name in ("siglip2", "sam3")]
    args = argparse.Namespace(model="vit", teachers=teachers, cls_token_per_teacher=True)
    torch.save({"state_dict": state, "args": args}, tmp_path / "c-radio_v4.pth.tar")
    images = photographs(2)
    with torch.no_grad():
        patches = model(images).features.flatten(2).transpose(1, 2)
        expected = head.eval()(patches)
    folder = radio.fuse(tmp_path / "c-radio_v4.pth.tar", tmp_path / "encoder")
    for source in (tmp_path / "c-radio_v4.pth.tar", folder):
        found = radio.load(source).encode(images, "sam3:features")["sam3:features"]
        assert rms_error(found, expected) < 1e-5


def test_attention_heads_of_another_layout_are_named() -> None:
    state = attention_state()
    assert head_problem(state) is None
    for changed, key in (
        ({**state, "blocks.0.attn.qkv.bias": torch.ones(288)}, r"blocks.0.attn.qkv.bias"),
        ({k: v for k, v in state.items() if k != "blocks.1.ls2.gamma"}, "blocks.1.ls2.gamma"),
        ({**state, "mlp.pre_norm.0.weight": torch.ones(96)}, "mlp.pre_norm.0.weight"),
    ):
        assert head_problem(changed) == f"it is an attention head of another layout ({key})"


def test_an_attention_head_that_is_not_whole_is_refused(tmp_path: Path) -> None:
    state = attention_state()
    for lost in ("mlp.fc1.weight", "blocks.0.norm1.weight"):
        broken = {key: value for key, value in state.items() if key != lost}
        folder = write_small(
            tmp_path / lost, teachers={"parts": TeacherHeads(None, {"features": broken})}
        )
        with pytest.raises(RadioError, match=r"parts:features.*" + lost):
            radio.load(folder)


def test_plain_heads_say_nothing_of_upsampling() -> None:
    weights = small_weights()
    assert all(teacher.upsample == 1 for teacher in weights.teachers.values())
    assert weights.teachers["words"].dim("summary") == 12
    assert "upsample" not in json.dumps(config_of(weights))
