"""Task zero-shot, judged by open_clip's classifier and scikit-learn's accuracies."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from picture_zoo import colours
from sklearn.metrics import balanced_accuracy_score, top_k_accuracy_score
from small_encoder import head, small_weights

from radio.config import load_teacher
from radio.encoder.weights import TeacherHeads
from radio.errors import RadioError
from radio.evaluation.pictures import Pictures
from radio.evaluation.result import Options
from radio.evaluation.retrieval import first_rank, retrieval
from radio.evaluation.target_kinds import EncoderTarget, PixelsTarget, TeacherTarget
from radio.evaluation.templates import TEMPLATES, templates_of
from radio.evaluation.zero_shot import ranks_of, zero_shot

NAMES = {3: "tench", 5: "goldfish, Carassius auratus", 8: "tow truck", 9: "quail"}
LABELS = [3, 5, 8, 3, 5, 8, 9, 9, 3, 5]
SEED = 7
CLIP = {"kind": "clip", "options": {"model": "demo-clip"}, "pretrained": None, "seed": SEED}


def write_data(
    folder: Path, samples: Sequence[Mapping[str, Any]], classes: Mapping[int, str] | None = None
) -> Pictures:
    """Write a val shard of coloured pictures with these fields beside them."""
    folder.mkdir(parents=True, exist_ok=True)
    with tarfile.open(folder / "val-000000.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
        for number, fields in enumerate(samples):
            picture = io.BytesIO()
            colours(40 + number, 36, number).save(picture, "PNG")
            blobs = {"jpg": picture.getvalue()}
            for field, value in fields.items():
                text = json.dumps(value) if field == "json" else str(value)
                blobs[field] = text.encode()
            for field, blob in blobs.items():
                member = tarfile.TarInfo(f"{number:06d}.{field}")
                member.size = len(blob)
                tar.addfile(member, io.BytesIO(blob))
    if classes is not None:
        lines = [f"{number}\tn{number}\t{name}" for number, name in classes.items()]
        (folder / "classes.txt").write_text("\n".join(lines))
    return Pictures(folder)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, _two_threads: None) -> None:
    monkeypatch.setenv("RADIO_CACHE", str(tmp_path / "cache"))
    torch.set_num_threads(1)


@pytest.fixture
def data(tmp_path: Path) -> Pictures:
    return write_data(tmp_path / "data", [{"cls": label} for label in LABELS], NAMES)


@pytest.fixture(scope="module")
def clip() -> TeacherTarget:
    return TeacherTarget("demo_clip", load_teacher("demo_clip"), SEED)


def judged(summaries: torch.Tensor, classes: Sequence[int], templates: Sequence[str]) -> np.ndarray:
    """Return the cosines [N, classes] of summaries with open_clip's own classifier."""
    torch.manual_seed(SEED)
    model = open_clip.create_model("demo-clip").eval().requires_grad_(False)
    tokenizer = open_clip.get_tokenizer("demo-clip")
    names = [NAMES[label].split(",")[0] for label in classes]
    weights = open_clip.build_zero_shot_classifier(model, tokenizer, names, templates)
    return (F.normalize(summaries, dim=1) @ weights).numpy()


def summaries_of(target: Any, data: Pictures, name: str, size: int) -> torch.Tensor:
    from radio.encoder.images import resized

    split = data.split("val")
    pictures = [resized(split.picture(index), 1, size) for index in range(len(split))]
    found: torch.Tensor = target.extract(torch.stack(pictures), (name,))[name]
    return found


def test_a_teacher_is_judged_by_open_clip_and_scikit_learn(
    clip: TeacherTarget, data: Pictures
) -> None:
    result = zero_shot(clip, data, Options())
    scores = judged(summaries_of(clip, data, "summary", 128), list(NAMES), TEMPLATES)
    columns = np.asarray([list(NAMES).index(label) for label in LABELS])
    assert result.score == pytest.approx(top_k_accuracy_score(columns, scores, k=1))
    assert result.details["top5"] == 1
    assert result.details["mean_per_class"] == pytest.approx(
        balanced_accuracy_score(columns, scores.argmax(1))
    )
    assert np.array_equal(result.samples, scores.argmax(1) == columns)
    per_class = result.details["per_class"]
    assert list(per_class) == ["tench", "goldfish", "tow truck", "quail"]
    assert per_class["tench"] == pytest.approx(result.samples[columns == 0].mean())
    assert result.interval is not None and result.interval[0] <= result.score <= result.interval[1]
    json.dumps(result.as_dict())


def test_some_classes_play_among_themselves(clip: TeacherTarget, data: Pictures) -> None:
    templates = ("a photo of a {}.", "one {}")
    result = zero_shot(clip, data, Options(classes=(8, 3), templates=templates))
    kept = [index for index, label in enumerate(LABELS) if label in (3, 8)]
    scores = judged(summaries_of(clip, data, "summary", 128)[kept], [3, 8], templates)
    expected = scores.argmax(1) == np.asarray([LABELS[index] == 8 for index in kept])
    assert np.array_equal(result.samples, expected)
    assert result.details["pictures"] == len(kept) and result.details["chance"] == 0.5


def encoder(**teachers: TeacherHeads) -> EncoderTarget:
    return EncoderTarget("student", replace(small_weights(), teachers=teachers))


def test_an_encoder_is_asked_for_the_adaptor_that_has_text(data: Pictures) -> None:
    target = encoder(
        parts=TeacherHeads(2, {"summary": head(96, 128)}, facts={"kind": "dinov2"}),
        clip=TeacherHeads(0, {"summary": head(96, 128, seed=1)}, facts=CLIP),
    )
    result = zero_shot(target, data, Options(size=32))
    assert result.details["features"] == "clip:summary" and result.details["size"] == 32
    scores = judged(summaries_of(target, data, "clip:summary", 32), list(NAMES), TEMPLATES)
    columns = [list(NAMES).index(label) for label in LABELS]
    assert result.score == pytest.approx(top_k_accuracy_score(columns, scores, k=1))
    with pytest.raises(RadioError, match=r"adaptor 'parts' has no text tower.*: clip; all: parts"):
        zero_shot(target, data, Options(adaptor="parts"))
    with pytest.raises(RadioError, match="has 192 channels but the text tower of 'clip' gives 128"):
        zero_shot(target, data, Options(features="summary"))
    with pytest.raises(RadioError, match="'features' is no summary"):
        zero_shot(target, data, Options(features="features"))


def test_what_does_not_match_is_refused(
    clip: TeacherTarget, data: Pictures, tmp_path: Path
) -> None:
    with pytest.raises(RadioError, match="'pixels' has no text tower"):
        zero_shot(PixelsTarget(), data, Options())
    with pytest.raises(RadioError, match=r"class 4 is not in .*classes\.txt; expected"):
        zero_shot(clip, data, Options(classes=(3, 4)))
    with pytest.raises(RadioError, match=r"nothing is told apart by 1 class \(\['tench'\]\)"):
        zero_shot(clip, data, Options(classes=(3,)))
    more = write_data(tmp_path / "more", [{"cls": 3}, {"cls": 5}], NAMES)
    with pytest.raises(RadioError, match=r"class 9 \(quail\) of .*more has no picture"):
        zero_shot(clip, more, Options(classes=(3, 9)))
    assert list(zero_shot(clip, more, Options()).details["per_class"]) == ["tench", "goldfish"]
    outside = write_data(tmp_path / "outside", [{"cls": 4}], NAMES)
    with pytest.raises(RadioError, match=r"class 4 is not in classes\.txt"):
        zero_shot(clip, outside, Options())
    bare = write_data(tmp_path / "bare", [{"txt": "a dog"}], NAMES)
    with pytest.raises(RadioError, match=r"has no cls; its fields are: jpg, txt"):
        zero_shot(clip, bare, Options())


@pytest.mark.parametrize("task", [zero_shot, retrieval])
def test_the_tokens_of_another_tokenizer_are_refused(
    task: Any, clip: TeacherTarget, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write_data(tmp_path / "both", [{"cls": 3, "txt": "a"}, {"cls": 5, "txt": "b"}], NAMES)
    tower = clip.text_tower()
    tower.vocab = 10
    monkeypatch.setattr(clip, "text_tower", lambda *_: tower)
    with pytest.raises(RadioError, match=r"gives token \d+ .* knows 10; give the tokenizer of"):
        task(clip, data, Options())


def test_templates_are_a_list_or_a_file(tmp_path: Path) -> None:
    path = tmp_path / "templates.txt"
    path.write_text("a drawing of a {}.\n\n  the {} there\n")
    assert templates_of((f"@{path}",)) == ("a drawing of a {}.", "the {} there")
    assert templates_of(None) == TEMPLATES and templates_of("a {}") == ("a {}",)
    with pytest.raises(RadioError, match=r"the template 'a dog' has no \{\}"):
        templates_of(("a {}", "a dog"))
    with pytest.raises(RadioError, match="no template in"):
        templates_of(())
    with pytest.raises(RadioError, match="cannot read the templates of"):
        templates_of(f"@{tmp_path}")


def test_ranks_are_those_of_a_stable_descending_sort() -> None:
    rng = np.random.default_rng(0)
    scores = torch.tensor(rng.integers(0, 4, (60, 9)) / 4.0)  # with many ties
    relevant = torch.tensor(rng.random((60, 9)) < 0.3)
    relevant[:, 4] |= ~relevant.any(dim=1)
    order = np.argsort(-scores.numpy(), axis=1, kind="stable")
    expected = np.take_along_axis(relevant.numpy(), order, axis=1).argmax(axis=1)
    assert np.array_equal(first_rank(scores, relevant), expected)
    with pytest.raises(RadioError, match="NaN or infinite"):
        first_rank(torch.full((1, 2), torch.nan), torch.tensor([[True, False]]))


def test_chunks_do_not_change_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    summaries = torch.randn(11, 6, generator=generator)
    weights = torch.randn(6, 7, generator=generator)
    expected = torch.randint(0, 7, (11,), generator=generator)
    whole = ranks_of(summaries, weights, expected)
    monkeypatch.setattr("radio.evaluation.zero_shot.CHUNK", 4)
    assert torch.equal(ranks_of(summaries, weights, expected), whole)
