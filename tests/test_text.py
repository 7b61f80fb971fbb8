"""Text towers against open_clip and transformers, on whole models saved in the upstream layouts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import save_file
from test_teachers_upstream import shaken
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor, nn

from teachers import build_teacher
from teachers.open_clip_tower import register_models
from teachers.text import TextTower, build_text_tower, zero_shot_weights

TEXTS = ["a photo of a cat", "two Dogs, running!", "", "word " * 200, "naïve café ☕"]
CLASSES = [f"{colour} {thing}" for colour in ("red", "blue", "green") for thing in "abcde"]
WORDS = ["<pad>", "</s>", "<unk>", "a", "photo", "of", "cat", "dog", "the", "red", "it", "s", "big"]
OPTIONS = {"clip": {"model": "demo-clip"}, "siglip": {"model": "demo-map", "image_size": 128}}


@pytest.fixture(autouse=True)
def _one_thread(_two_threads: None) -> None:
    torch.set_num_threads(1)


def whole_model(kind: str) -> nn.Module:
    register_models()
    options = OPTIONS[kind]
    side = options.get("image_size")
    return shaken(open_clip.create_model(options["model"], force_image_size=side))


def write_tokenizer(folder: Path, words: list[str] = WORDS) -> Path:
    """Write a case-sensitive tokenizer of whole words that ends a text like SigLIP's."""
    vocab = {word: number for number, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    whole = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )
    whole.save_pretrained(folder)
    return folder


# open_clip


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_an_open_clip_tower_is_open_clip_s(kind: str, tmp_path: Path) -> None:
    whole = whole_model(kind)
    save_file(whole.state_dict(), tmp_path / "whole.safetensors")
    tower = build_text_tower(kind, "t", OPTIONS[kind], str(tmp_path / "whole.safetensors"), 99)
    tokens = open_clip.get_tokenizer(OPTIONS[kind]["model"])(TEXTS)
    with torch.no_grad():
        expected = whole.encode_text(tokens, normalize=True)
    found = tower(TEXTS)
    assert torch.equal(found, expected)
    assert found.shape == (5, tower.dim) and tower.dim == {"clip": 128, "siglip": 192}[kind]
    assert torch.equal(tower(TEXTS[0]), tower([TEXTS[0]]))
    torch.testing.assert_close(tower(TEXTS, batch=2), expected)


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_seeded_weights_are_those_of_the_seeded_teacher(kind: str) -> None:
    """Both towers of one seed are one model, so that the demo's words and pictures belong."""
    options = OPTIONS[kind]
    register_models()
    torch.manual_seed(7)
    whole = open_clip.create_model(options["model"], force_image_size=options.get("image_size"))
    whole.eval().requires_grad_(False)  # torch computes otherwise where it is asked for
    before = torch.get_rng_state()
    tower = build_text_tower(kind, "t", options, None, 7)
    assert torch.equal(torch.get_rng_state(), before)
    tokens = open_clip.get_tokenizer(options["model"])(TEXTS)
    assert torch.equal(tower(TEXTS), whole.encode_text(tokens, normalize=True))
    teacher = build_teacher(kind, "t", options, None, 7)
    first = "visual.conv1.weight" if kind == "clip" else "trunk.patch_embed.proj.weight"
    own = whole.visual.state_dict()[first.removeprefix("visual.")]
    assert torch.equal(teacher.state_dict()[first], own)
    assert teacher.summary_dim == tower.dim


def test_a_tower_holds_no_image_weights_and_never_trains(tmp_path: Path) -> None:
    tower = build_text_tower("clip", "t", OPTIONS["clip"], None, 0)
    assert not any("visual" in key for key in tower.state_dict())
    tower.train()
    assert not tower.training and not any(w.requires_grad for w in tower.parameters())
    found = tower(TEXTS)
    assert not found.requires_grad
    torch.testing.assert_close(found.norm(dim=1), torch.ones(5))


def siglip2_model(folder: Path) -> str:
    """Tell open_clip of a small SigLIP2, which reads its tokenizer from the hub."""
    config = {
        "embed_dim": 192,
        "init_logit_bias": -10,
        "custom_text": True,
        "vision_cfg": {
            "image_size": 64,
            "timm_model_name": "vit_tiny_patch16_224",
            "timm_model_pretrained": False,
            "timm_pool": "map",
            "timm_proj": "none",
        },
        "text_cfg": {
            "context_length": 64,
            "vocab_size": len(WORDS),
            "hf_tokenizer_name": "nobody/tiny-siglip2",
            "tokenizer_kwargs": {"clean": "canonicalize"},
            "width": 32,
            "heads": 2,
            "layers": 1,
            "no_causal_mask": True,
            "proj_bias": True,
            "pool_type": "last",
        },
    }
    folder.mkdir()
    (folder / "tiny-siglip2.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder)
    return "tiny-siglip2"


@pytest.fixture(scope="module")
def siglip2(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Path]:
    """Return a whole SigLIP2 of open_clip and the folder of its weights and tokenizer."""
    folder = tmp_path_factory.mktemp("siglip2")
    whole = shaken(open_clip.create_model(siglip2_model(folder / "models")))
    save_file(whole.state_dict(), folder / "open_clip_model.safetensors")
    write_tokenizer(folder)
    return whole, folder


def siglip2_tower(pretrained: Path | None, tokenizer: Path | None = None) -> TextTower:
    path = None if pretrained is None else str(pretrained)
    return build_text_tower("siglip", "s", {"model": "tiny-siglip2"}, path, 0, tokenizer)


def ids(*words: str) -> list[int]:
    tokens = [WORDS.index(word) for word in (*words, "</s>")]
    return tokens + [0] * (64 - len(tokens))


def words_of(text: str) -> list[int]:
    return ids(*text.split())


def test_siglip2_reads_lower_case_without_punctuation_padded_to_64(
    siglip2: tuple[nn.Module, Path],
) -> None:
    whole, folder = siglip2
    tower = siglip2_tower(folder / "open_clip_model.safetensors")
    tokens = torch.tensor([ids("a", "photo", "of", "a", "cat"), ids("the", "dog", "<unk>")])
    texts = [" A photo... of a 'CAT'!", "The_dog   sleeps"]
    assert torch.equal(tower.tokenize(texts), tokens)
    with torch.no_grad():
        assert torch.equal(tower(texts), whole.encode_text(tokens, normalize=True))
    long = tower.tokenize(["cat " * 100])
    assert long.shape == (1, 64) and long[0, -1] == 1, "the end is kept"


def test_a_tokenizer_is_given_or_lies_next_to_the_weights(
    siglip2: tuple[nn.Module, Path], tmp_path: Path
) -> None:
    whole, folder = siglip2
    expected = siglip2_tower(folder / "open_clip_model.safetensors")(["a cat"])
    save_file(whole.state_dict(), tmp_path / "alone.safetensors")
    for given in (folder, folder / "tokenizer.json"):
        assert torch.equal(
            siglip2_tower(tmp_path / "alone.safetensors", given)(["a cat"]), expected
        )
    with pytest.raises(ValueError, match=r"none next to .*alone\.safetensors.*tokenizer\.json"):
        siglip2_tower(tmp_path / "alone.safetensors")
    with pytest.raises(ValueError, match=r"holds no tokenizer; expected a folder with"):
        siglip2_tower(tmp_path / "alone.safetensors", tmp_path)
    with pytest.raises(ValueError, match="its weights are seeded"):
        siglip2_tower(None)  # seeded weights ask no network
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match=r"the tokenizer of .* cannot be had"):
        siglip2_tower(tmp_path / "alone.safetensors", tmp_path)


def test_a_tokenizer_of_another_model_is_refused(
    siglip2: tuple[nn.Module, Path], tmp_path: Path
) -> None:
    other = write_tokenizer(tmp_path / "other", [*WORDS, "cow"])
    tower = siglip2_tower(siglip2[1] / "open_clip_model.safetensors", other)
    assert tower(["a cat"]).shape == (1, 192)
    with pytest.raises(ValueError, match=rf"token {len(WORDS)} but the text tower knows"):
        tower(["a cow"])


# transformers


SMALL_TEXT = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 32,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 1,
    "projection_size": 48,
}
SMALL_VISION = {
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}


LETTERS = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *"▁abcdefghijklmnopqrstuvwxyz"]


def write_letters(folder: Path) -> Path:
    """Write transformers' own SigLIP2 tokenizer, of letters, which says nothing of padding."""
    vocab = {letter: number for number, letter in enumerate(LETTERS)}
    tokenizer = transformers.Siglip2Tokenizer(vocab=vocab, merges=[], add_eos_token=True)
    tokenizer.save_pretrained(folder)
    file = folder / "tokenizer_config.json"
    settings = json.loads(file.read_text())
    assert settings.pop("padding_side", "left") == "left"
    file.write_text(json.dumps(settings))
    return folder


def letters(text: str) -> list[int]:
    tokens = [*(LETTERS.index(letter) for letter in text.replace(" ", "▁")), 1]
    return tokens + [0] * (64 - len(tokens))


@pytest.mark.parametrize("kind", ["Siglip2", "Siglip"])
def test_a_tower_of_transformers_is_its_text_features(kind: str, tmp_path: Path) -> None:
    """The fixed sizes of SigLIP2 are of transformers' type siglip, NaFlex of siglip2."""
    config = getattr(transformers, f"{kind}Config")(
        text_config=SMALL_TEXT, vision_config=SMALL_VISION
    )
    whole = shaken(getattr(transformers, f"{kind}Model")(config))
    whole.save_pretrained(tmp_path / "whole")
    write, spell = (write_letters, letters) if kind == "Siglip2" else (write_tokenizer, words_of)
    write(tmp_path / "whole")
    options = {"native_size": 64, "patch_size": 16, "width": 48}
    tokens = torch.tensor([spell("a photo of the big dog"), spell("it s")])
    with torch.no_grad():
        output = whole.get_text_features(input_ids=tokens)
        pooled = output if isinstance(output, Tensor) else output.pooler_output
    for pretrained in (tmp_path / "whole", tmp_path / "whole" / "model.safetensors"):
        tower = build_text_tower("siglip_naflex", "n", options, str(pretrained), 0)
        texts = ["A photo of the 'BIG' dog.", "it_s"]
        assert torch.equal(tower.tokenize(texts), tokens)
        assert torch.equal(tower(texts), F.normalize(pooled, dim=-1))
        assert tower.dim == 48
    (tmp_path / "whole" / "config.json").unlink()
    with pytest.raises(ValueError, match=r"read from config\.json, which is not with"):
        build_text_tower("siglip2", "n", options, str(tmp_path / "whole"), 0)


def test_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    config = transformers.CLIPConfig(text_config=SMALL_TEXT, vision_config=SMALL_VISION)
    transformers.CLIPModel(config).save_pretrained(tmp_path / "clip")
    with pytest.raises(ValueError, match="a model of type 'clip', expected siglip or siglip2"):
        build_text_tower("siglip_naflex", "n", {}, str(tmp_path / "clip"), 0)
    with pytest.raises(ValueError, match=r"seeded weights are an image tower.*siglip2-base"):
        build_text_tower("siglip_naflex", "n", {}, None, 0)
    save_file(whole_model("siglip").state_dict(), tmp_path / "siglip.safetensors")
    with pytest.raises(ValueError, match=r"is of another model \(missing: ln_final"):
        build_text_tower("clip", "c", OPTIONS["clip"], str(tmp_path / "siglip.safetensors"), 0)


# what is refused


@pytest.mark.parametrize(
    ("kind", "options", "pretrained", "words"),
    [
        ("sam", {}, None, r"'sam' has no text tower; kinds that have one: clip, siglip,"),
        ("clip", {"model": "ViT-Q"}, None, "open_clip has no model 'ViT-Q'"),
        ("clip", {}, None, "open_clip has no model 'None'"),
        ("clip", {"model": "ViT-B-32"}, "nonesuch", r"no weights 'nonesuch'; tags: openai"),
        ("clip", {"model": "ViT-B-32"}, "openai", "HF_HUB_OFFLINE is set"),
        ("clip", {"model": "demo-clip"}, "gone.pt", r"'gone\.pt' does not exist"),
        ("siglip2", {}, "google/siglip2-giant-opt-patch16-384", "HF_HUB_OFFLINE is set"),
    ],
)
def test_towers_that_cannot_be_had_say_why(
    kind: str, options: dict[str, Any], pretrained: str | None, words: str
) -> None:
    with pytest.raises(ValueError, match=rf"teacher 't': .*{words}"):
        build_text_tower(kind, "t", options, pretrained, 0)


def test_texts_that_are_none_are_refused() -> None:
    tower = build_text_tower("clip", "t", OPTIONS["clip"], None, 0)
    with pytest.raises(ValueError, match=r"teacher 't': expected one text or more, got \[\]"):
        tower([])
    with pytest.raises(ValueError, match="reads open_clip's own tokenizer, so leave out 'x'"):
        build_text_tower("clip", "t", OPTIONS["clip"], None, 0, "x")


# zero-shot


@pytest.mark.parametrize(
    "templates",
    [["a photo of a {}.", "{}", "art of the {}, big"], open_clip.OPENAI_IMAGENET_TEMPLATES[:4]],
)
def test_zero_shot_weights_are_open_clip_s(templates: Any, tmp_path: Path) -> None:
    """Fifteen classes are more than go through at once."""
    whole = whole_model("clip")
    save_file(whole.state_dict(), tmp_path / "whole.safetensors")
    tower = build_text_tower("clip", "t", OPTIONS["clip"], str(tmp_path / "whole.safetensors"), 0)
    tokenizer = open_clip.get_tokenizer("demo-clip")
    expected = open_clip.build_zero_shot_classifier(whole, tokenizer, CLASSES, templates)
    found = zero_shot_weights(tower, CLASSES, templates)
    assert torch.equal(found, expected) and found.shape == (128, 15)
    torch.testing.assert_close(zero_shot_weights(tower, CLASSES[:3], templates), expected[:, :3])


def test_zero_shot_without_classes_or_places_is_refused() -> None:
    tower = build_text_tower("clip", "t", OPTIONS["clip"], None, 0)
    with pytest.raises(ValueError, match="0 classes and 1 templates"):
        zero_shot_weights(tower, [], ["{}"])
    with pytest.raises(ValueError, match="2 classes and 0 templates"):
        zero_shot_weights(tower, ["a", "b"], [])
    with pytest.raises(ValueError, match=r"'a photo' has no \{\}"):
        zero_shot_weights(tower, ["a", "b"], ["{}", "a photo"])
