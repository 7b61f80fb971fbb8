"""Pictures and texts in one space: LiT (2111.07991) for pocket_clip, SigLIP for pocket_siglip.

A batch is half captioned pictures of flickr8k, half pictures of tiny-imagenet-100. Its texts are
one caption of each of the former, the name of every class that may be paired, and a draw of the
other ImageNet-1k names but those held out. Pictures are compared with their captions and with
names: the true one where the class is known (and may be paired), and everywhere with what the
trunk's own classifier thinks of the names at hand. The classifier's rows go for pictures of their
names, so that words far beyond the eighty classes find their place.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from open_clip.zero_shot_metadata import IMAGENET_CLASSNAMES
from torch import Tensor, nn

from teachers.pocket.recipes.checkpoint import Checkpoint, Origin
from teachers.pocket.recipes.data import Classes, imagenet_synsets
from teachers.pocket.recipes.text import TEMPLATES, schedule, tokens_of

LR = 1e-3
BODY = 0.05  # of LR: the text tower below its projection keeps what it was distilled to know
OTHERS = 128  # further names of ImageNet-1k in a step


@dataclass(frozen=True)
class Names:
    """The names in the order that a step indexes: the paired classes first, then the others.

    `rows` are their rows in the trunk's classifier.
    """

    texts: tuple[str, ...]
    rows: Int[Tensor, " names"]
    num_paired: int

    @classmethod
    def of(cls, classes: Classes) -> Names:
        """Leave out what is held out, wherever it comes from."""
        synsets = imagenet_synsets()
        texts = [classes.names[at].split(",")[0].strip() for at in classes.seen]
        rows = [synsets.index(classes.synsets[at]) for at in classes.seen]
        known = set(classes.synsets)
        for row, synset in enumerate(synsets):
            if synset not in known:
                texts.append(IMAGENET_CLASSNAMES[row])
                rows.append(row)
        return cls(tuple(texts), torch.tensor(rows), len(classes.seen))

    def draw(self, generator: torch.Generator) -> tuple[Int[Tensor, " drawn"], list[str]]:
        """Return the positions of a step's names and their texts in drawn templates."""
        others = torch.randperm(len(self.texts) - self.num_paired, generator=generator)[:OTHERS]
        at = torch.cat([torch.arange(self.num_paired), others + self.num_paired])
        forms = torch.randint(len(TEMPLATES), (len(at),), generator=generator).tolist()
        texts = [
            TEMPLATES[form].format(self.texts[place])
            for form, place in zip(forms, at.tolist(), strict=True)
        ]
        return at, texts


@dataclass(frozen=True)
class Step:
    """What a loss sees: unit vectors and what belongs together.

    `pictures` are captioned first, then those with a class; `captions` go with the former, `names`
    are the step's names, `labels` the latter's places among them, `belief` [pictures, names] the
    trunk's own distribution over them, `rows` its classifier's weights of them, as pictures.
    """

    pictures: Float[Tensor, "pictures dim"]
    captions: Float[Tensor, "captions dim"]
    names: Float[Tensor, "names dim"]
    labels: Int[Tensor, " labelled"]
    belief: Float[Tensor, "pictures names"]
    rows: Float[Tensor, "names dim"]


def softmax_loss(step: Step, scale: Tensor) -> dict[str, Tensor]:
    """Return CLIP's losses (2103.00020, figure 3), names as the texts of labelled pictures."""
    count = len(step.captions)
    logits = scale * step.pictures @ step.names.T
    pairs = scale * step.pictures[:count] @ step.captions.T
    own, each = torch.arange(count), torch.arange(len(step.names))
    rows = scale * step.rows @ step.names.T
    return {
        "captions": (F.cross_entropy(pairs, own) + F.cross_entropy(pairs.T, own)) / 2,
        "names": F.cross_entropy(logits[count:], step.labels),
        "belief": F.kl_div(logits.log_softmax(1), step.belief, reduction="batchmean"),
        "rows": (F.cross_entropy(rows, each) + F.cross_entropy(rows.T, each)) / 2,
    }


def sigmoid_loss(step: Step, scale: Tensor, bias: Tensor) -> dict[str, Tensor]:
    """Return SigLIP's losses: every picture and text is a yes or a no (2303.15343, algorithm 1).

    The trunk's belief is a yes of its probability.
    """
    count = len(step.captions)
    logits = scale * step.pictures @ step.names.T + bias
    pairs = scale * step.pictures[:count] @ step.captions.T + bias
    yes = F.one_hot(step.labels, len(step.names)).to(logits.dtype)
    return {
        "captions": _per_row(pairs, torch.eye(count)),
        "names": _per_row(logits[count:], yes),
        "belief": _per_row(logits, step.belief),
        "rows": _per_row(scale * step.rows @ step.names.T + bias, torch.eye(len(step.names))),
    }


def _per_row(logits: Tensor, yes: Tensor) -> Tensor:
    loss = F.binary_cross_entropy_with_logits(logits, yes, reduction="sum")
    return loss / len(logits)


@dataclass(frozen=True)
class Pairs:
    """What is drawn from: features by view and picture, labels of those that have one, captions.

    `pooled` is what the locked trunk says; `hidden`, what goes into its last stage, is there for a
    recipe that trains that stage. `labelled` and `captioned` are places among the pictures.
    """

    pooled: Float[Tensor, "views pictures width"]
    hidden: Float[Tensor, "views pictures c h w"] | None
    labelled: Int[Tensor, " labelled"]
    labels: Int[Tensor, " labelled"]
    captioned: Int[Tensor, " captioned"]
    captions: Sequence[Sequence[str]]

    def draw(
        self, each: int, generator: torch.Generator
    ) -> tuple[tuple[Tensor, Tensor], Int[Tensor, " each"], list[str]]:
        """Return where to find `each` captioned and `each` labelled pictures; labels; captions."""
        some = torch.randint(len(self.captioned), (each,), generator=generator)
        others = torch.randint(len(self.labelled), (each,), generator=generator)
        views = torch.randint(len(self.pooled), (2 * each,), generator=generator)
        places = torch.cat([self.captioned[some], self.labelled[others]])
        which = torch.randint(1 << 20, (each,), generator=generator).tolist()
        texts = [
            self.captions[at][pick % len(self.captions[at])]
            for at, pick in zip(some.tolist(), which, strict=True)
        ]
        return (views, places), self.labels[others], texts


def train_pairs(
    model: Any,
    tokenizer: Any,
    pairs: Pairs,
    names: Names,
    classifier: nn.Linear,
    last_stage: nn.Module | None,
    path: Path,
    *,
    each: int,
    origin: Origin,
) -> list[dict[str, float]]:
    """Train the text tower, the projection and, where it is given, the trunk's last stage.

    `classifier` is the trunk's own; the last stage's batch norms keep their statistics. Returns
    the curve of losses.
    """
    generator = torch.Generator().manual_seed(origin.seed)
    optimizer = _optimizer(model, last_stage)
    rates = [group["lr"] for group in optimizer.param_groups]
    parts = {"text": model.text, "head": model.visual.head, "optimizer": optimizer}
    parts |= {} if last_stage is None else {"last stage": last_stage}
    saved = Checkpoint(path, parts, generator, origin, scalars=_scalars(model))
    steps = origin.steps
    while saved.step < steps:
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * schedule(saved.step, steps)
        where, labels, texts = pairs.draw(each, generator)
        places, said = names.draw(generator)
        pooled = pairs.pooled[where].float()
        with torch.no_grad():
            belief = classifier(pooled)[:, names.rows[places]].softmax(1)
        if last_stage is not None:
            assert pairs.hidden is not None
            pooled = last_stage(pairs.hidden[where].float())
        vectors = F.normalize(model.text(tokens_of(tokenizer, texts + said)), dim=1)
        pictures = F.normalize(model.visual.head(pooled), dim=1)
        centred = classifier.weight.detach() - classifier.weight.detach().mean(0)
        rows = F.normalize(model.visual.head(centred[names.rows[places]]), dim=1)
        step = Step(pictures, vectors[:each], vectors[each:], labels, belief, rows)
        scale = model.logit_scale.exp().clamp(max=100)
        if model.logit_bias is None:
            losses = softmax_loss(step, scale)
        else:
            losses = sigmoid_loss(step, scale, model.logit_bias)
        optimizer.zero_grad(set_to_none=True)
        torch.stack(list(losses.values())).sum().backward()
        optimizer.step()
        if saved.step % 50 == 0:
            saved.told(**{key: value.item() for key, value in losses.items()})
        saved.done(saved.step == steps - 1)
    return saved.curve


def _scalars(model: Any) -> list[Tensor]:
    """Return the logits' scale, and SigLIP's bias."""
    return [model.logit_scale] + ([] if model.logit_bias is None else [model.logit_bias])


def _optimizer(model: Any, last_stage: nn.Module | None) -> torch.optim.Optimizer:
    heads = [*model.text.text_projection.parameters(), *model.visual.head.parameters()]
    known = {id(weight) for weight in heads}
    body = [weight for weight in model.text.parameters() if id(weight) not in known]
    groups: list[dict[str, Any]] = [
        {"params": heads, "lr": LR, "weight_decay": 0.05},
        {"params": body, "lr": LR * BODY},
        {"params": _scalars(model), "lr": LR, "weight_decay": 0.0},
    ]
    if last_stage is not None:
        groups.append({"params": list(last_stage.parameters()), "lr": LR / 10})
    return torch.optim.AdamW(groups, betas=(0.9, 0.98), fused=True)
