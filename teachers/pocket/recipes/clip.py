"""pocket_clip: CLIP's loss on a locked trunk; pocket_siglip: SigLIP's, its last stage unlocked."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import open_clip
import torch
from torch import Tensor, nn

from teachers.open_clip_tower import register_models
from teachers.pocket.recipes.checkpoint import Origin
from teachers.pocket.recipes.contrastive import Pairs
from teachers.pocket.recipes.data import Classes, captions, definitions, lemmas, samples
from teachers.pocket.recipes.text import distil_text, sentence_vectors, train_tokenizer
from teachers.pocket.recipes.trunk import Views

TEXT_STEPS = 1200


def text_tower(data: Path, work: Path, origin: Origin) -> tuple[Any, Path, list[dict[str, float]]]:
    """Return a model whose text tower follows the sentence encoder; its tokenizer; the curve.

    Both pocket models start from it, so it is trained once and kept in `work`.
    """
    from transformers import AutoTokenizer

    register_models()
    torch.manual_seed(origin.seed)
    model = open_clip.create_model("pocket-clip")
    folder = work / "tokenizer"
    said = [text for sample in samples(data / "flickr8k", "train") for text in captions(sample)]
    names = list(lemmas().values())
    texts = names + definitions() + said
    if not folder.exists():
        train_tokenizer(texts, folder)
    vectors = sentence_vectors(texts, work / "sentences.safetensors")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    curve = distil_text(
        model.text,
        tokenizer,
        texts,
        vectors,
        work / "text.pt",
        names=len(names),
        origin=origin,
    )
    return model, folder, curve


def pairs_of(data: Path, views: Views, hidden: Tensor | None) -> tuple[Pairs, Classes]:
    """Return what both models learn from; pictures of held-out classes are left out.

    `views` hold the pictures of tiny-imagenet-100 first, then those of flickr8k.
    """
    classes = Classes.read(data / "tiny-imagenet-100")
    labels = [int(sample["cls"]) for sample in samples(data / "tiny-imagenet-100", "train")]
    said = [captions(sample) for sample in samples(data / "flickr8k", "train")]
    place = {label: at for at, label in enumerate(classes.seen)}
    seen = [at for at, label in enumerate(labels) if label in place]
    return Pairs(
        pooled=views["pooled"],
        hidden=hidden,
        labelled=torch.tensor(seen),
        labels=torch.tensor([place[labels[at]] for at in seen]),
        captioned=torch.arange(len(labels), len(labels) + len(said)),
        captions=said,
    ), classes


class LastStage(nn.Module):
    """The trunk from its last stage of blocks on, pooled; batch norms keep their statistics."""

    def __init__(self, trunk: Any) -> None:
        super().__init__()
        self.blocks = copy.deepcopy(trunk.blocks[-1])
        self.conv_head, self.bn2 = copy.deepcopy(trunk.conv_head), copy.deepcopy(trunk.bn2)
        self.eval()

    def forward(self, hidden: Tensor) -> Tensor:
        """Return pooled features [b, 1280] of what goes into the last stage."""
        pooled: Tensor = self.bn2(self.conv_head(self.blocks(hidden))).mean((2, 3))
        return pooled


def as_siglip(model: Any) -> Any:
    """Return SigLIP's model with the same text tower: a bias, and its first temperature."""
    siglip = open_clip.create_model("pocket-siglip")
    siglip.text.load_state_dict(model.text.state_dict())
    return siglip


def whole_state(model: Any, trunk: Any, last_stage: LastStage | None) -> dict[str, Tensor]:
    """Return the state of the whole open_clip model, the trunk put into its image tower."""
    state = trunk.state_dict()
    if last_stage is not None:
        moved = {
            f"blocks.{len(trunk.blocks) - 1}.{k}": v
            for k, v in last_stage.blocks.state_dict().items()
        }
        for part in ("conv_head", "bn2"):
            values = getattr(last_stage, part).state_dict()
            moved |= {f"{part}.{key}": value for key, value in values.items()}
        state = state | moved
    own = model.visual.trunk.state_dict()
    model.visual.trunk.load_state_dict({key: state[key] for key in own})
    whole: dict[str, Tensor] = model.state_dict()
    return whole
