"""Task `zero-shot`: pictures are classified by the names of their classes alone."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from radio.errors import RadioError
from radio.evaluation.labelled import among, chosen_classes, per_class
from radio.evaluation.pictures import Pictures
from radio.evaluation.result import Options, Result, bootstrap
from radio.evaluation.retrieval import CHUNK, first_rank, refused_texts, summary_of, unit_summaries
from radio.evaluation.target import Target
from radio.evaluation.templates import templates_of
from radio.progress import Report
from teachers.text import zero_shot_weights


def zero_shot(
    target: Target, data: Pictures, options: Options, progress: Report | None = None
) -> Result:
    """Measure top-1 accuracy of summaries against the mean text of each class (CLIP, 2103.00020).

    The names are those of classes.txt, the templates `options.templates`; with `options.classes`
    only these classes' pictures and names take part. A tie goes to the class that comes first.

    Raises:
        RadioError: no labels, no text tower, a class that classes.txt lacks or that has no picture,
            a tokenizer of another tower, or features that are not finite.
    """
    split = data.split("val")
    labels = split.labels()
    classes = chosen_classes(data, options.classes, (labels,))
    names = [data.classes[number] for number in classes]
    if len(classes) < 2:
        raise RadioError(
            f"nothing is told apart by {len(classes)} class ({names}); give two or more"
        )
    name, templates = summary_of(target, options), templates_of(options.templates)
    tower = target.text_tower(options.adaptor, options.tokenizer)
    kept = among(labels, classes)
    with refused_texts():
        weights = zero_shot_weights(tower, names, templates)
    summaries = unit_summaries(target, split, name, tower, options, progress)[kept]
    place = {number: at for at, number in enumerate(classes)}
    expected = torch.tensor([place[number] for number in labels[kept].tolist()])
    ranks = ranks_of(summaries, weights, expected)
    hits = (ranks < 1).double().numpy()
    shares = per_class(hits, expected, names)
    return Result(
        "zero-shot",
        target.name,
        float(hits.mean()),
        bootstrap(hits, seed=options.seed),
        {
            "score_is": "top-1 accuracy",
            "top5": float((ranks < 5).double().mean()),
            "mean_per_class": float(np.mean(list(shares.values()))),
            "per_class": shares,
            "features": name,
            "size": options.size or target.size_for(name),
            "templates": list(templates),
            "pictures": len(hits),
            "classes": len(classes),
            "chance": 1 / len(classes),
        },
        hits,
    )


def ranks_of(
    summaries: Float[Tensor, "n d"],
    weights: Float[Tensor, "d classes"],
    expected: Int[Tensor, " n"],
) -> Int[Tensor, " n"]:
    """Return the place, from 0, of each picture's own class by its unit summary's cosines."""
    ranks = []
    for start in range(0, len(summaries), CHUNK):
        part = slice(start, start + CHUNK)
        own = F.one_hot(expected[part], weights.shape[1]).bool()
        ranks.append(first_rank(summaries[part] @ weights, own))
    return torch.cat(ranks)
