"""Task retrieval, judged by torchmetrics' hit rate and by a bootstrap written out."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from small_encoder import head
from test_zero_shot import CLIP, SEED, encoder, summaries_of, write_data
from torchmetrics.retrieval import RetrievalHitRate

from radio.config import load_teacher
from radio.encoder.weights import TeacherHeads
from radio.errors import RadioError
from radio.evaluation.pictures import Pictures
from radio.evaluation.result import Options
from radio.evaluation.retrieval import TOP, hits_of, retrieval
from radio.evaluation.target_kinds import PixelsTarget, TeacherTarget

WORDS = ["dog", "red car", "tree", "two men", "boat", "child", "snow", "ball", "horse"]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, _two_threads: None) -> None:
    monkeypatch.setenv("RADIO_CACHE", str(tmp_path / "cache"))
    torch.set_num_threads(1)


def captions_of(count: int) -> list[list[str]]:
    """Return one to three captions a picture, some of them the same as another picture's."""
    return [
        [f"a {WORDS[(picture * step) % len(WORDS)]} by day" for step in range(1, 2 + picture % 3)]
        for picture in range(count)
    ]


@pytest.fixture
def data(tmp_path: Path) -> Pictures:
    return write_data(
        tmp_path / "captions", [{"json": {"captions": several}} for several in captions_of(14)]
    )


@pytest.fixture(scope="module")
def clip() -> TeacherTarget:
    return TeacherTarget("demo_clip", load_teacher("demo_clip"), SEED)


def judged(
    pictures: torch.Tensor, vectors: torch.Tensor, captions: list[list[str]]
) -> dict[tuple[str, int], float]:
    """Return torchmetrics' hit rates: both directions, at 1, 5 and 10."""
    texts = [text for several in captions for text in several]
    relevant = torch.tensor([[text in several for text in texts] for several in captions])
    scores, found = pictures @ vectors.T, {}
    for k in TOP:
        judge = RetrievalHitRate(top_k=k)
        for direction, s, r in (
            ("image_to_text", scores, relevant),
            ("text_to_image", scores.T, relevant.T),
        ):
            queries = torch.arange(len(s))[:, None].expand(s.shape)
            value = judge(s.flatten(), r.flatten(), indexes=queries.flatten())
            found[direction, k] = float(value)
    return found


def test_both_directions_are_torchmetrics_hit_rates(clip: TeacherTarget, data: Pictures) -> None:
    result = retrieval(clip, data, Options())
    captions = captions_of(14)
    texts = [text for several in captions for text in several]
    assert result.details["distinct_captions"] < result.details["captions"] == len(texts)
    summaries = F.normalize(summaries_of(clip, data, "summary", 128), dim=1)
    expected = judged(summaries, clip.text_tower()(texts), captions)
    found = {(row["direction"], row["k"]): row["recall"] for row in result.details["rows"]}
    assert found == pytest.approx(expected, abs=1e-6)
    means = [expected[direction, 5] for direction in ("image_to_text", "text_to_image")]
    assert result.score == pytest.approx(np.mean(means), abs=1e-6)
    json.dumps(result.as_dict())


@pytest.mark.parametrize("chunk", [3, 512])
def test_random_unit_vectors_in_chunks(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("radio.evaluation.retrieval.CHUNK", chunk)
    generator = torch.Generator().manual_seed(1)
    captions = captions_of(40)
    texts = [text for several in captions for text in several]
    kinds = {text: torch.randn(16, generator=generator) for text in texts}
    vectors = F.normalize(torch.stack([kinds[text] for text in texts]), dim=1)
    pictures = F.normalize(torch.randn(40, 16, generator=generator), dim=1)
    hits = hits_of(pictures, vectors, [len(c) for c in captions], texts)
    expected = judged(pictures, vectors, captions)
    for column, k in enumerate(TOP):
        recalls = hits[:, :, column].sum(0) / hits[:, :, -1].sum(0)
        both = expected["image_to_text", k], expected["text_to_image", k]
        assert recalls == pytest.approx(both, abs=1e-6)


def test_perfect_vectors_find_each_other_and_equal_texts_count_for_all() -> None:
    vectors = torch.eye(3)[[0, 1, 2, 0]]
    pictures = torch.eye(3)[[0, 1, 0]]
    hits = hits_of(pictures, vectors, [1, 2, 1], ["a", "b", "c", "a"])
    assert hits[:, 0, 0].tolist() == [1, 1, 1]
    # Caption "c" of the second picture scores 0 with all three: the first wins the tie.
    assert hits[:, 1, 0].tolist() == [1, 1, 1]
    assert hits[:, 1, -1].tolist() == [1, 2, 1]


def test_intervals_weigh_pictures_with_their_captions(clip: TeacherTarget, data: Pictures) -> None:
    result = retrieval(clip, data, Options())
    hits = result.samples
    weights = np.random.default_rng(0).standard_exponential((1000, len(hits)))
    shares = (weights @ hits[:, 1, 1]) / (weights @ hits[:, 1, -1])
    row = next(
        r for r in result.details["rows"] if r["direction"] == "text_to_image" and r["k"] == 5
    )
    assert row["interval"] == pytest.approx(list(np.percentile(shares, [2.5, 97.5])))
    assert result.interval is not None and result.interval[0] <= result.score <= result.interval[1]


def test_an_encoder_s_adaptor_and_one_caption_a_picture(tmp_path: Path) -> None:
    target = encoder(clip=TeacherHeads(0, {"summary": head(96, 128)}, facts=CLIP))
    data = write_data(tmp_path / "txt", [{"txt": f"{word}\n"} for word in WORDS])
    result = retrieval(target, data, Options(size=32))
    assert result.details["features"] == "clip:summary"
    assert result.details["captions"] == result.details["pictures"] == len(WORDS)
    assert result.details["rows"][2]["recall"] == 1  # 9 pictures are among the first 10


def test_what_cannot_be_retrieved_is_refused(clip: TeacherTarget, tmp_path: Path) -> None:
    blank = write_data(tmp_path / "blank", [{"json": {"captions": ["a", " "]}}])
    with pytest.raises(RadioError, match="blank: picture 000000 has an empty caption"):
        retrieval(clip, blank, Options())
    labelled = write_data(tmp_path / "labelled", [{"cls": 0}], {0: "cat"})
    with pytest.raises(RadioError, match="has no captions"):
        retrieval(clip, labelled, Options())
    with pytest.raises(RadioError, match="'pixels' has no text tower"):
        retrieval(PixelsTarget(), labelled, Options())
