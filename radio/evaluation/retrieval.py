"""Task `retrieval`: pictures find their captions, and captions their pictures."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from radio.errors import RadioError
from radio.evaluation.features import features_of
from radio.evaluation.pictures import Pictures, Split
from radio.evaluation.result import Options, Result, bootstrap
from radio.evaluation.target import Target
from radio.progress import Report
from teachers.text import TextTower

TOP = (1, 5, 10)
CHUNK = 512  # queries against the whole gallery at once
DIRECTIONS = ("image_to_text", "text_to_image")


def retrieval(
    target: Target, data: Pictures, options: Options, progress: Report | None = None
) -> Result:
    """Measure recall at 1, 5 and 10 between val pictures and captions; score: mean of both at 5.

    A picture's query is a hit at k if one of its captions is among the k nearest of all captions;
    a caption's, if a picture that has it, word for word, is among the k nearest pictures (the
    Flickr8k protocol of Karpathy and Fei-Fei, 1412.2306, with equal texts told apart by nobody).
    The gallery is always the whole split; what comes first wins a tie. Intervals weigh pictures
    together with their captions.

    Raises:
        RadioError: no captions, no text tower, a tokenizer of another one, or features that are not
            finite.
    """
    split = data.split("val")
    name = summary_of(target, options)
    captions = [split.captions(index) for index in range(len(split))]
    _check_captions(data, split, captions)
    tower = target.text_tower(options.adaptor, options.tokenizer)
    texts = [text for several in captions for text in several]
    with refused_texts():
        vectors = tower(texts)
    pictures = unit_summaries(target, split, name, tower, options, progress)
    hits = hits_of(pictures, vectors, [len(several) for several in captions], texts)
    rows = [
        {"direction": direction, "k": k, **_measured(hits[:, row, [column, -1]], options.seed)}
        for row, direction in enumerate(DIRECTIONS)
        for column, k in enumerate(TOP)
    ]
    at_five = hits[:, :, [TOP.index(5), -1]]
    return Result(
        "retrieval",
        target.name,
        mean_recall(at_five),
        bootstrap(at_five, mean_recall, seed=options.seed),
        {
            "score_is": "mean of recall@5 of both directions",
            "rows": rows,
            "curve": {
                "label": "k",
                "value": "recall",
                "x": list(TOP),
                "y": {d: [r["recall"] for r in rows if r["direction"] == d] for d in DIRECTIONS},
            },
            "features": name,
            "size": options.size or target.size_for(name),
            "pictures": len(split),
            "captions": len(texts),
            "distinct_captions": len(set(texts)),
        },
        hits,
    )


def summary_of(target: Target, options: Options) -> str:
    """Return which output is compared with texts: `options.features`, or the adaptor's summary.

    Raises:
        RadioError: the target has no text tower, or no such summary.
    """
    own = target.output("summary", target.text_adaptor(options.adaptor))
    name = options.features or own
    target.check(name)
    if not name.endswith("summary"):
        raise RadioError(f"'{name}' is no summary, so no text can be compared with it; give {own}")
    return name


@contextmanager
def refused_texts() -> Iterator[None]:
    """Turn what a text tower refuses, such as the tokens of another tokenizer, into RadioError."""
    try:
        yield
    except ValueError as error:
        raise RadioError(str(error)) from error


def unit_summaries(
    target: Target,
    split: Split,
    name: str,
    tower: TextTower,
    options: Options,
    progress: Report | None,
) -> Float[Tensor, "n d"]:
    """Return the pictures' unit vectors; RadioError if they are not as wide as the tower's."""
    summaries = features_of(target, split, name, options.size, progress)
    if summaries.shape[1] != tower.dim:
        raise RadioError(
            f"'{name}' of '{target.name}' has {summaries.shape[1]} channels but the text tower of "
            f"'{tower.name}' gives {tower.dim}; leave out --features, or give the adaptor that "
            "goes with it"
        )
    return F.normalize(summaries, dim=1)


def first_rank(
    scores: Float[Tensor, "queries gallery"], relevant: Bool[Tensor, "queries gallery"]
) -> Int[Tensor, " queries"]:
    """Return the place, from 0, of the first relevant item in each stable descending order.

    Raises:
        RadioError: a score is not finite (NaN would look like a hit).
    """
    if not bool(torch.isfinite(scores).all()):
        raise RadioError("some features are NaN or infinite; check the target's weights")
    best = scores.masked_fill(~relevant, -torch.inf).max(dim=1, keepdim=True).values
    at_best = relevant & (scores == best)
    first = at_best.int().argmax(dim=1, keepdim=True)
    earlier = torch.arange(scores.shape[1], device=scores.device) < first
    return ((scores > best) | ((scores == best) & earlier)).sum(dim=1)


def hits_of(
    pictures: Float[Tensor, "n d"],
    vectors: Float[Tensor, "m d"],
    counts: Sequence[int],
    texts: Sequence[str],
) -> np.ndarray:
    """Return [n, 2, 4] per picture: hits at 1, 5, 10 and the number of queries, both directions.

    Row 0 is the picture as one query, row 1 the sums over its captions.

    Args:
        pictures: unit summaries.
        vectors: unit vectors of all captions, picture by picture.
        counts: captions of each picture.
        texts: the captions themselves, which say what is equal.
    """
    number = {text: index for index, text in enumerate(dict.fromkeys(texts))}
    text_of = torch.tensor([number[text] for text in texts])
    owner = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    has = torch.zeros(len(counts), len(number), dtype=torch.bool)
    has[owner, text_of] = True
    by_picture = _in_chunks(pictures, vectors, lambda part: has[part][:, text_of])
    by_caption = _in_chunks(vectors, pictures, lambda part: has[:, text_of[part]].T)
    hits = np.zeros((len(counts), 2, len(TOP) + 1))
    hits[:, 0, -1], hits[:, 1, -1] = 1, counts
    for column, k in enumerate(TOP):
        hits[:, 0, column] = (by_picture < k).numpy()
        hits[:, 1, column] = np.bincount(owner, (by_caption < k).numpy(), minlength=len(counts))
    return hits


def _in_chunks(
    queries: Float[Tensor, "q d"],
    gallery: Float[Tensor, "g d"],
    relevant: Callable[[slice], Tensor],
) -> Int[Tensor, " q"]:
    ranks = []
    for start in range(0, len(queries), CHUNK):
        part = slice(start, start + CHUNK)
        ranks.append(first_rank(queries[part] @ gallery.T, relevant(part)))
    return torch.cat(ranks)


def mean_recall(hits: np.ndarray) -> float:
    """Return sum of hits over sum of queries of [n, ..., 2], the mean of it over directions."""
    found, queries = np.moveaxis(hits.sum(axis=0), -1, 0)
    return float(np.mean(found / queries))


def _measured(hits: Float[np.ndarray, "n 2"], seed: int) -> dict[str, Any]:
    interval = bootstrap(hits, mean_recall, seed=seed)
    return {"recall": mean_recall(hits), "interval": list(interval)}


def _check_captions(data: Pictures, split: Split, captions: Sequence[Sequence[str]]) -> None:
    for key, several in zip(split.keys, captions, strict=True):
        if not several or not all(text.strip() for text in several):
            raise RadioError(f"{data.name}: picture {key} has an empty caption, or none at all")
