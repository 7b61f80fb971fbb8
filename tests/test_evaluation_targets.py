"""Whatever `radio evaluate` can be pointed at, and what it says when it cannot."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from small_encoder import photographs, small_weights, write_small
from tiny import tiny_config

from radio.config import load_teacher
from radio.encoder.encoder import load
from radio.encoder.fuse import fuse
from radio.encoder.weights import EncoderWeights
from radio.errors import RadioError
from radio.evaluation.target_kinds import EncoderTarget, TeacherTarget
from radio.evaluation.targets import TimmTarget, resolve
from radio.training.distill import distill
from teachers import build_teacher
from teachers.weights import shipped

IMAGES = photographs(3, 64, 64)


def test_pixels_are_values_and_cells_with_their_place() -> None:
    target = resolve("pixels")
    found = target.extract(IMAGES, ("summary", "features"))
    assert torch.equal(found["summary"].sort().values, (IMAGES / 255).flatten(1).sort().values)
    cells = found["features"]
    assert cells.shape == (3, 5, 16, 16)
    torch.testing.assert_close(
        cells[1, :3, 2, 5], IMAGES[1, :, 8:12, 20:24].float().mean((1, 2)) / 255
    )
    assert cells[0, 3:, 2, 5].tolist() == [5.5 / 16, 2.5 / 16]
    assert (target.size_for("summary"), target.size_for("features")) == (64, 256)
    with pytest.raises(RadioError, match="no text tower"):
        target.text_tower()
    with pytest.raises(RadioError, match="no mask decoder"):
        target.mask_decoder()


def test_an_encoder_gives_what_encode_gives_as_maps(tmp_path: Path) -> None:
    folder = write_small(tmp_path / "encoder")
    target, encoder = resolve(folder), load(folder)
    names = ("summary", "features", "words:summary", "edges:features")
    expected = encoder.encode(IMAGES, names)
    found = target.extract(IMAGES, names)
    for name in names:
        value = found[name].flatten(2).transpose(1, 2) if found[name].ndim == 4 else found[name]
        assert torch.equal(value, expected[name]), name
    assert target.fingerprint == encoder.fingerprint
    assert (target.native_size, target.patch, target.takes_any_size) == (64, 16, True)
    assert set(names) < set(target.names)
    with pytest.raises(RadioError, match=r"'clip:summary'; this encoder has: .*words:summary"):
        target.check("clip:summary")


def with_kinds(**kinds: str) -> EncoderWeights:
    weights = small_weights()
    facts = {name: {"kind": kind, "options": {}} for name, kind in kinds.items()}
    teachers = {
        name: replace(heads, facts=facts.get(name, {"kind": "dinov2"}))
        for name, heads in weights.teachers.items()
    }
    return replace(weights, teachers=teachers)


def test_an_encoder_knows_which_adaptors_have_text_and_masks() -> None:
    target = EncoderTarget("mine", with_kinds(parts="siglip", edges="sam"))
    assert target.text_adaptor() == target.text_adaptor("parts") == "parts"
    assert target.mask_adaptor() == "edges"
    assert target.output("summary", "parts") == "parts:summary"
    assert target.facts["edges"]["kind"] == "sam"
    with pytest.raises(
        RadioError, match="'words' has no text tower; adaptors with one: parts; all"
    ):
        target.text_tower("words")
    with pytest.raises(RadioError, match="'lost' has no mask decoder"):
        target.mask_decoder("lost")
    with pytest.raises(RadioError, match=r"with 'edges' .no pretrained, no seed in"):
        target.mask_decoder()
    with pytest.raises(RadioError, match="no adaptor has a text tower; adaptors with one: none"):
        EncoderTarget("mine", with_kinds()).text_tower()


def test_a_run_is_the_encoder_that_it_would_be_fused_to(tmp_path: Path) -> None:
    run = distill(tiny_config(tmp_path, steps=2)).out
    fused = resolve(fuse(run, tmp_path / "encoder"))
    for place in (run, run / "checkpoints" / "step-000002"):
        target = resolve(place)
        assert target.fingerprint == fused.fingerprint
        assert (target.names, target.native_size) == (fused.names, fused.native_size)
    assert torch.equal(*(t.extract(IMAGES, ("summary",))["summary"] for t in (target, fused)))


def test_a_seeded_text_tower_reads_by_the_tokenizer_that_is_given() -> None:
    config = load_teacher("pocket_clip")
    seeded = TeacherTarget("clip", replace(config, pretrained=None), 0)
    with pytest.raises(RadioError, match=r"a tokenizer, and its weights are seeded"):
        seeded.text_tower()
    texts = ["a cat", "a street with two buses"]
    tower = seeded.text_tower(tokenizer=str(shipped()["pocket_clip"].parent))
    trained = TeacherTarget("clip", config, 0).text_tower()
    assert torch.equal(tower.tokenize(texts), trained.tokenize(texts))
    assert not torch.allclose(tower(texts), trained(texts), atol=0.1)


def test_a_teacher_by_name_and_by_file(tmp_path: Path) -> None:
    target = resolve("demo_clip")
    config = load_teacher("demo_clip")
    teacher = build_teacher(config.kind, "demo_clip", dict(config.options), None, 0)
    images = photographs(2, 128, 128)
    mean, std = (torch.tensor(v)[:, None, None] for v in (teacher.mean, teacher.std))
    expected = teacher((images / 255 - mean) / std)
    found = target.extract(images, ("summary", "features"))
    assert torch.equal(found["summary"], expected.summary)
    assert torch.equal(found["features"], expected.features)
    assert target.fingerprint == teacher.fingerprint
    tower = target.text_tower()
    assert tower(["a cat", "a dog"]).shape == (2, found["summary"].shape[1])
    with pytest.raises(RadioError, match="has no adaptor 'clip'; leave it out"):
        target.text_tower("clip")
    with pytest.raises(RadioError, match="128 px only"):
        target.checked_size(64)
    source = Path(__file__).parents[1] / "configs" / "teacher" / "demo_clip.yaml"
    copy = tmp_path / "mine.yaml"
    copy.write_text(source.read_text())
    assert (resolve(copy).name, resolve(copy).fingerprint) == ("mine", target.fingerprint)


def test_a_teacher_without_a_summary_and_one_of_any_size() -> None:
    assert resolve("demo_sam").names == ("features",)
    with pytest.raises(RadioError, match="it has: features"):
        resolve("demo_sam").output("summary")
    target = resolve("demo_dinov2")
    assert target.takes_any_size and target.checked_size(56) == 56
    assert target.extract(photographs(1, 56, 56), ("features",))["features"].shape[2:] == (4, 4)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("kind: [", "no YAML"),
        ("- clip", "no teacher"),
        ("options: {}", "no teacher"),
        ("kind: clip\nweight: 1", "weight"),
        ("kind: dino", "unknown kind 'dino'"),
        ("kind: clip\noptions: {model: no-such}", "no-such"),
    ],
)
def test_broken_teacher_files_are_refused(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(RadioError, match=said):
        resolve(tmp_path / "mine.yaml")


@pytest.mark.parametrize("name", ["test_vit", "test_resnet", "test_byobnet"])
def test_timm_models_give_pooled_features_and_maps(name: str) -> None:
    options = {"dynamic_img_size": True} if name == "test_vit" else {}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = timm.create_model(name, num_classes=0, **options)
    target = TimmTarget(name, model)
    assert target.takes_any_size
    size = 3 * target.patch
    images = photographs(2, size, size)
    found = target.extract(images, ("summary", "features"))
    mean, std = (torch.tensor(model.pretrained_cfg[key])[:, None, None] for key in ("mean", "std"))
    torch.testing.assert_close(found["summary"], model((images / 255 - mean) / std))
    assert found["features"].shape[2:] == (3, 3)
    with torch.no_grad():
        next(model.parameters()).add_(1)
    assert TimmTarget(name, model).fingerprint != target.fingerprint


def test_a_timm_vit_of_one_size_says_so() -> None:
    target = TimmTarget("vit", timm.create_model("vit_tiny_patch16_224", depth=1))
    with pytest.raises(RadioError, match="224 px only"):
        target.checked_size(64)


def test_timm_weights_come_from_timm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = timm.create_model("test_vit")
    timm.models.save_for_hf(model, tmp_path / "weights")
    target = resolve(f"timm:local-dir:{tmp_path / 'weights'}")
    assert target.takes_any_size
    images = photographs(2, 160, 160)
    expected = TimmTarget("here", model).extract(images, ("features",))["features"]
    torch.testing.assert_close(target.extract(images, ("features",))["features"], expected)
    for name in ("resnet18.a1_in1k", "timm:resnet18"):
        with pytest.raises(RadioError, match=r"cannot load 'resnet18.* network to fetch them"):
            resolve(name)
    with pytest.raises(RadioError, match="cannot load 'no_such_model'"):
        resolve("timm:no_such_model")


def test_an_unknown_target_hears_what_was_tried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RadioError, match=r"'luck'.*run folder.*demo_clip.*timm model.*pixels"):
        resolve("luck")
    (tmp_path / "luck").mkdir()
    with pytest.raises(RadioError, match="luck holds nothing; expected an encoder folder"):
        resolve("luck")
    (tmp_path / "luck.pth.tar").write_bytes(b"none")
    with pytest.raises(RadioError, match=r"luck\.pth\.tar"):
        resolve("luck.pth.tar")
