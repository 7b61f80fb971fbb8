"""Data folders, kept features, intervals, and the tasks that need neither text nor masks."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from data_folder import sample, write_folder, write_split
from picture_zoo import cut_in_half, saved, write_tar
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor

from radio.cli import main
from radio.errors import RadioError
from radio.evaluation.command import whole_numbers
from radio.evaluation.evaluate import FIDELITY, TASKS, evaluate, measure, task_named
from radio.evaluation.features import features_of
from radio.evaluation.knn import knn_votes
from radio.evaluation.linear import logistic_regression, standardised
from radio.evaluation.masks import ratio
from radio.evaluation.mode_switch import worst_ratio
from radio.evaluation.pictures import Pictures
from radio.evaluation.rank import rank_me
from radio.evaluation.result import (
    Options,
    Result,
    Statistic,
    bootstrap,
    mean,
    paired_bootstrap,
    weighted,
)
from radio.evaluation.retrieval import mean_recall
from radio.evaluation.segmentation import mean_iou
from radio.evaluation.similarity import cka, cka_and_effects, cka_interval
from radio.evaluation.target import Target
from radio.evaluation.targets import PixelsTarget


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RADIO_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("colours"))


class MeanColour(Target):
    """Counts how many pictures it has seen."""

    def __init__(self, fingerprint: str = "0") -> None:
        super().__init__("mean", fingerprint, ("summary", "features"), native_size=16, patch=8)
        self.seen = 0

    def extract(self, images: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
        self.seen += len(images)
        maps = torch.nn.functional.avg_pool2d(images.float(), self.patch)
        return {name: maps.mean((2, 3)) if name == "summary" else maps for name in names}


# Data folders


def test_a_folder_says_what_it_holds(folder: Path) -> None:
    data = Pictures(folder)
    assert data.classes == {3: "red", 5: "green", 8: "blue"}
    assert data.class_texts[3] == "red, crimson"
    split = data.split("train")
    assert (len(split), split.keys[41]) == (60, "000041")
    assert split.labels().tolist()[:4] == [3, 5, 8, 3]
    assert split.picture(2).mode == "RGB" and split.picture(2).size == (24, 24)
    assert np.asarray(split.picture(2)).mean((0, 1)).argmax() == 2
    assert split.label_map(0).sum() == 8 * 14
    assert split.captions(0) == ["a", "b"] and split.instances(0)[0]["area"] == 112
    assert split.has("captions") and split.has("instances") and not split.has("sem.png")


def test_the_fingerprint_is_of_the_bytes_alone(folder: Path, tmp_path: Path) -> None:
    same = write_folder(tmp_path / "elsewhere")
    assert Pictures(same).fingerprint == Pictures(folder).fingerprint
    write_split(same, "val", [sample(3, np.random.default_rng(7))])
    assert Pictures(same).split("val").fingerprint != Pictures(folder).split("val").fingerprint
    assert Pictures(same).split("train").fingerprint == Pictures(folder).split("train").fingerprint


@pytest.mark.parametrize(
    ("lines", "names", "kinds"),
    [
        ("0\tbackground\n1\tperson\n", ["background", "person"], ["", ""]),
        ("0\tsky\t\n11\tunlabelled\tignore\n", ["sky", "unlabelled"], ["", "ignore"]),
        ("1\t44\tbottle\tthing\n2\t9\tsea\tstuff\n", ["bottle", "sea"], ["thing", "stuff"]),
        ("0\tn01\ttench, Tinca tinca\n", ["tench"], [""]),
    ],
)
def test_classes_of_every_form(
    lines: str, names: list[str], kinds: list[str], tmp_path: Path
) -> None:
    data = Pictures(write_folder(tmp_path / "data", 1, 1, lines))
    assert list(data.classes.values()) == names
    assert list(data.class_kinds.values()) == kinds


@pytest.mark.parametrize(
    "lines",
    ["red\n", "x\tred\n", "1\tred\n1\tblue\n", "1\tn1\tred\n3\tn3\t\n", "1\t, red\n"],
)
def test_broken_classes_are_refused(lines: str, tmp_path: Path) -> None:
    with pytest.raises(RadioError, match=r"classes\.txt"):
        Pictures(write_folder(tmp_path / "data", 1, 1, lines))


def changed(tmp_path: Path, **fields: bytes | None) -> Pictures:
    """Return data whose first val sample has other fields; None drops one, _ stands for a dot."""
    one = sample(3, np.random.default_rng(0))
    for name, value in fields.items():
        one.pop(name, None) if value is None else one.update({name.replace("_", "."): value})
    write_folder(tmp_path / "data", 3, 1)
    write_split(tmp_path / "data", "val", [one])
    return Pictures(tmp_path / "data")


def test_what_a_sample_lacks_is_said_with_what_it_has(tmp_path: Path) -> None:
    split = changed(tmp_path, cls=None, json=b"{}", txt=None).split("val")
    with pytest.raises(RadioError, match=r"'000000' has no cls; .*are: jpg, json, png"):
        split.labels()
    with pytest.raises(RadioError, match=r"no sem\.png"):
        split.label_map(0, "sem.png")
    with pytest.raises(RadioError, match="no captions"):
        split.captions(0)
    with pytest.raises(RadioError, match="no instances"):
        split.instances(0)


def test_one_caption_in_txt_will_do(tmp_path: Path) -> None:
    assert changed(tmp_path, json=None).split("val").captions(0) == ["a"]


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("cls", b"9", "class 9 is not in classes.txt, which has 3 to 8"),
        ("cls", b"-1", "class -1"),
        ("cls", b"red", "'red'; expected a class number"),
        ("png", saved(Image.new("L", (12, 24))), "12 x 24 px but its picture is 24 x 24"),
        ("png", saved(Image.new("RGB", (24, 24))), "mode RGB"),
        ("png", b"no picture", "its png cannot be read"),
        ("json", b"{", "its json cannot be read"),
        ("jpg", cut_in_half(sample(3, np.random.default_rng(0))["jpg"]), "'000000'"),
    ],
)
def test_bad_samples_are_named(field: str, value: bytes, said: str, tmp_path: Path) -> None:
    split = changed(tmp_path, **{field: value}).split("val")
    with pytest.raises(RadioError, match=said):
        split.labels(), split.label_map(0), split.instances(0), split.picture(0)


def test_folders_without_shards_or_splits_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RadioError, match="no folder"):
        Pictures(tmp_path / "nowhere")
    with pytest.raises(RadioError, match="no shards"):
        Pictures(tmp_path)
    write_split(tmp_path, "train", [sample(3, np.random.default_rng(0))])
    with pytest.raises(RadioError, match=r"no split 'val' .*: train"):
        Pictures(tmp_path).split("val")
    (tmp_path / "val-000000.tar").write_bytes(b"no tar")
    with pytest.raises(RadioError, match="no plain tar"):
        Pictures(tmp_path).split("val")
    write_tar(tmp_path / "val-000000.tar", [])
    with pytest.raises(RadioError, match=r"'val' of .* has no sample in val-000000\.tar"):
        Pictures(tmp_path).split("val")


# Features


def test_features_are_taken_once_by_weights_pictures_output_and_size(folder: Path) -> None:
    split, target = Pictures(folder).split("val"), MeanColour()
    seen: list[tuple[int, int]] = []
    first = features_of(target, split, "features", progress=lambda *at: seen.append(at), batch=16)
    assert first.shape == (30, 3, 2, 2) and seen == [(16, 30), (30, 30)]
    assert torch.equal(features_of(target, split, "features"), first) and target.seen == 30
    picture = np.asarray(split.picture(5).resize((16, 16), Image.Resampling.BICUBIC), np.float32)
    expected = picture.reshape(2, 8, 2, 8, 3).mean((1, 3)).transpose(2, 0, 1)
    np.testing.assert_allclose(first[5], expected, rtol=1e-5)
    for change in (
        lambda: features_of(target, split, "summary"),
        lambda: features_of(target, split, "features", 24),
        lambda: features_of(target, Pictures(folder).split("train"), "features"),
    ):
        before = target.seen
        change()
        assert target.seen > before
    other = MeanColour("1")
    features_of(other, split, "features")
    assert other.seen == 30


def test_broken_kept_features_are_made_again(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    split = Pictures(folder).split("val")
    first = features_of(MeanColour(), split, "summary").clone()
    (kept,) = (tmp_path / "cache").iterdir()
    kept.write_bytes(kept.read_bytes()[:50])
    target = MeanColour()
    assert torch.equal(features_of(target, split, "summary"), first) and target.seen == 30
    assert "made again" in caplog.text


def test_sizes_and_outputs_that_do_not_fit_are_refused(folder: Path) -> None:
    split, target = Pictures(folder).split("val"), MeanColour()
    with pytest.raises(RadioError, match=r"20 px is no multiple .* nearest: 16 and 24"):
        features_of(target, split, "summary", 20)
    with pytest.raises(RadioError, match="'clip:summary'; it has: summary, features"):
        features_of(target, split, "clip:summary")
    target.takes_any_size = False
    with pytest.raises(RadioError, match="16 px only"):
        features_of(target, split, "summary", 24)


# Intervals


def test_the_bootstrap_covers_and_narrows() -> None:
    rng = np.random.default_rng(0)
    inside = 0
    for seed in range(60):
        values = rng.normal(1, 2, 80)
        low, high = bootstrap(values, resamples=200, seed=seed)
        inside += low < 1 < high
        assert high - low == pytest.approx(2 * 1.96 * 2 / 80**0.5, rel=0.45)
    assert inside >= 51
    assert bootstrap(values, seed=3) == bootstrap(values, seed=3) != bootstrap(values, seed=4)
    with pytest.raises(RadioError, match="no picture"):
        bootstrap([])


def test_pairs_share_their_pictures() -> None:
    rng = np.random.default_rng(0)
    hard = rng.normal(0, 5, (200, 2))
    ours, theirs = hard + 0.3 + rng.normal(0, 0.1, (200, 2)), hard

    def statistic(rows: np.ndarray) -> float:
        return float(rows.mean())

    low, high = paired_bootstrap(ours, theirs, statistic)
    assert 0.25 < low < 0.3 < high < 0.35
    with pytest.raises(RadioError, match="same pictures"):
        paired_bootstrap(ours, theirs[:9], statistic)


@pytest.mark.parametrize(
    ("statistic", "shape"),
    [
        (mean, ()),
        (ratio, (2,)),
        (mean_recall, (2, 2)),
        (worst_ratio, (3, 4, 2)),
        (mean_iou, (5, 5)),
    ],
)
def test_pictures_that_weigh_twice_are_pictures_that_are_there_twice(
    statistic: Statistic, shape: tuple[int, ...]
) -> None:
    rng = np.random.default_rng(0)
    for dtype in (np.int32, np.float64):
        rows = (rng.random((30, *shape)) * 9 + 1).astype(dtype)
        times = rng.integers(0, 3, 30)
        found = statistic(weighted(rows, times * (30 / times.sum())))
        assert found == pytest.approx(statistic(np.repeat(rows, times, axis=0)))
        assert found != pytest.approx(statistic(rows))


def test_a_class_in_a_single_picture_is_in_every_resample() -> None:
    samples = np.zeros((40, 2, 2), np.int32)
    samples[:, 0, 0], samples[:, 0, 1] = 90, 10
    samples[7, 1] = (5, 0)  # of the second class, which is never found
    score = mean_iou(samples)
    low, high = bootstrap(samples, mean_iou)
    assert 0.4 < score < 0.5 and low < score < high < 0.5
    assert (low + high) / 2 == pytest.approx(score, abs=0.01)
    least = samples[7:8] * 1e-3
    assert mean_iou(least) == pytest.approx(mean_iou(samples[7:8]))


def test_options_refuse_what_makes_no_sense() -> None:
    for options in ({"prompt": "scribble"}, {"size": 0}, {"sizes": (64, -1)}, {"classes": (1, 1)}):
        with pytest.raises(RadioError):
            Options(**options)  # type: ignore[arg-type]


# Tasks


def blobs(count: int, dim: int = 12, classes: int = 4, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, dim, generator=torch.Generator().manual_seed(9))
    labels = torch.randint(classes, (count,), generator=generator)
    return centres[labels] + 1.5 * torch.randn(count, dim, generator=generator), labels


def test_votes_are_those_of_scikit_learn() -> None:
    (train, labels), (val, _) = blobs(300), blobs(60, seed=1)
    votes = knn_votes(train, labels, val, 4, [10, 20])
    for k in (10, 20):
        judge = KNeighborsClassifier(
            k, metric="cosine", weights=lambda distance: np.exp((1 - distance) / 0.07)
        ).fit(train.double().numpy(), labels.numpy())
        expected = judge.predict_proba(val.double().numpy())
        np.testing.assert_allclose(votes[k], expected, atol=1e-4)


@pytest.mark.parametrize("penalty", [1.0, 0.01, 0.001])
def test_the_probe_is_that_of_scikit_learn(penalty: float) -> None:
    (train, labels), (val, _) = blobs(200), blobs(60, seed=1)
    train, val = standardised(10 * train + 3, 10 * val + 3)
    judge = LogisticRegression(C=1 / (penalty * len(train)), tol=1e-8, max_iter=2000)
    judge.fit(train.double().numpy(), labels.numpy())
    expected = judge.predict_proba(val.double().numpy())
    for dtype, tolerance in ((torch.float64, 2e-4), (torch.float32, 5e-3)):
        probe = logistic_regression(train.to(dtype), labels, 4, penalty)
        shares = probe(val.to(dtype)).softmax(dim=1)
        np.testing.assert_allclose(shares, expected, atol=tolerance)


def test_standardised_channels_have_deviation_1_and_constant_ones_are_dropped() -> None:
    train, val = blobs(50)[0], blobs(20, seed=1)[0]
    train[:, 3], val[:, 3] = 2.0, 5.0
    ours, theirs = standardised(train, val)
    expected = torch.ones(12).index_fill(0, torch.tensor(3), 0.0)
    torch.testing.assert_close(ours.std(dim=0, correction=0), expected)
    assert not theirs[:, 3].any()


def test_rank_me_is_the_entropy_of_the_singular_values() -> None:
    values = torch.randn(200, 16, generator=torch.Generator().manual_seed(0))
    sigma = np.linalg.svd(values.double().numpy(), compute_uv=False)
    shares = sigma / (sigma.sum() + 1e-7)
    assert rank_me(values) == pytest.approx(np.exp(-(shares * np.log(shares)).sum()), rel=1e-9)
    assert 15 < rank_me(values) <= 16
    assert rank_me(values) == pytest.approx(rank_me(100 * values), rel=1e-6)
    assert rank_me(values[:, :1] * torch.ones(16)) == pytest.approx(1, abs=1e-3)


def oracle_cka(a: np.ndarray, b: np.ndarray) -> float:
    a, b = a - a.mean(0), b - b.mean(0)
    norms = np.linalg.norm(a.T @ a) * np.linalg.norm(b.T @ b)
    return float(np.linalg.norm(a.T @ b) ** 2 / norms)


def test_cka_is_that_of_the_definition() -> None:
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(40, 6, generator=generator)
    b = a[:, :4] + 0.5 * torch.randn(40, 4, generator=generator)
    ours, theirs = a.double().numpy(), b.double().numpy()
    assert cka(a, b) == pytest.approx(oracle_cka(ours, theirs), rel=1e-9)
    turned = torch.linalg.qr(torch.randn(6, 6, generator=generator))[0]
    assert cka(a, 3 * a @ turned + 7) == pytest.approx(1, abs=1e-5)
    assert cka(a, torch.ones(40, 2)) == 0


def test_the_interval_of_cka_is_about_its_score_and_as_wide_as_it_varies() -> None:
    """Where pictures are repeated, the CKA of two random targets is below its own interval."""
    generator = torch.Generator().manual_seed(0)
    for shared in (0.0, 1.0):
        scores, widths = [], []
        for _ in range(40):
            a = torch.randn(100, 40, generator=generator)
            b = shared * a + torch.randn(100, 40, generator=generator)
            score, (low, high) = cka(a, b), cka_interval(a, b, 300)
            assert (low + high) / 2 == pytest.approx(score, abs=(high - low) / 6)
            scores.append(score)
            widths.append((high - low) / (2 * 1.96))
        assert 0.8 < np.mean(widths) / np.std(scores) < 2
    assert cka_interval(a, 3 * a + 7) == pytest.approx((1, 1), abs=1e-6)
    assert cka_interval(a, torch.ones(100, 2)) == (0, 0)
    assert cka_interval(a, b, seed=1) == cka_interval(a, b, seed=1) != cka_interval(a, b, seed=2)


def test_a_picture_s_effect_on_cka_is_what_its_weight_changes() -> None:
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(30, 5, generator=generator)
    b = a[:, :4] + torch.randn(30, 4, generator=generator)
    ours, theirs = a.double().numpy(), b.double().numpy()
    _, effects = cka_and_effects(a, b)
    for picture in (0, 11):
        found = []
        for step in (1e-5, -1e-5):
            weights = np.ones(30)
            weights[picture] += step
            root = np.sqrt(weights)[:, None]
            x, y = (v - np.average(v, axis=0, weights=weights) for v in (ours, theirs))
            x, y = x * root, y * root
            norms = np.linalg.norm(x.T @ x) * np.linalg.norm(y.T @ y)
            found.append(np.log(np.linalg.norm(x.T @ y) ** 2 / norms))
        assert effects[picture] == pytest.approx((found[0] - found[1]) / 2e-5, rel=1e-5)


@pytest.mark.parametrize("task", ["knn", "linear", "rank", "similarity"])
def test_a_task_is_deterministic_and_goes_into_json(task: str, folder: Path) -> None:
    options = Options(against="pixels", size=8)
    results = [evaluate(PixelsTarget(), task, folder, options=options) for _ in range(2)]
    assert results[0] == results[1] == json.loads(json.dumps(results[0]))
    assert list(results[0]) == ["task", "target", "score", "interval", "details"]
    assert results[0]["interval"][0] <= results[0]["score"] <= results[0]["interval"][1] + 1e-9
    assert results[0]["details"]["pictures"] == 30


def test_classes_can_be_chosen(folder: Path) -> None:
    (whole,) = measure("pixels", ["knn"], folder, Options(features="features", size=8))
    (two,) = measure("pixels", ["knn"], folder, Options(size=8, classes=(8, 3)))
    assert whole.details["classes"] == 3 and set(whole.details["per_class"]) == {
        "red",
        "green",
        "blue",
    }
    assert len(two.samples) == 20 and set(two.details["per_class"]) == {"blue", "red"}
    assert two.score == two.samples.mean() > 0.6


def test_data_that_cannot_be_scored_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(RadioError, match="class 4 is not in"):
        evaluate("pixels", "knn", folder, options=Options(classes=(3, 4)))
    with pytest.raises(RadioError, match="'clip:summary'"):
        evaluate("pixels", "linear", folder, options=Options(features="clip:summary"))
    with pytest.raises(RadioError, match="name the second"):
        evaluate("pixels", "similarity", folder)
    with pytest.raises(RadioError, match="--data"):
        evaluate("pixels", "knn")
    rng = np.random.default_rng(0)
    lacking = write_folder(tmp_path / "lacking")
    for path in lacking.glob("train-*.tar"):
        path.unlink()
    write_split(lacking, "train", [sample(label, rng) for label in (3, 5) * 10])
    with pytest.raises(RadioError, match=r"class 8 \(blue\) is scored but has no train"):
        evaluate("pixels", "knn", lacking)
    with pytest.raises(RadioError, match=r"class 8 \(blue\) .* has no picture"):
        evaluate("pixels", "knn", lacking, options=Options(classes=(5, 8)))
    write_split(lacking, "train", [sample(label, rng) for label in (3, 5, 8)])
    for task, said in (("knn", "20 or more"), ("linear", "10 or more")):
        with pytest.raises(RadioError, match=said):
            evaluate("pixels", task, lacking)


# The command


@pytest.mark.parametrize("task", sorted(set(TASKS) - {FIDELITY}))
def test_every_task_is_there(task: str) -> None:
    assert callable(task_named(task))


def say(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["radio", "evaluate", *words])
    with pytest.raises(SystemExit) as stopped:
        main()
    return int(stopped.value.code or 0)


def test_the_command_prints_writes_and_draws(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "classes").write_text("3, 5  # warm\n8\n")
    words = ["pixels", "--data", str(folder), "--size", "8", "--classes", f"@{tmp_path}/classes"]
    files = {"--json": tmp_path / "knn.json", "--figure": tmp_path / "knn.png"}
    more = [str(word) for pair in files.items() for word in pair]
    assert say(monkeypatch, *words, "--task", "knn", *more) == 0
    said = capsys.readouterr().out
    assert "95 % interval" in said and "neighbours" in said and "per class: blue" in said
    found = json.loads(files["--json"].read_text())
    assert found == evaluate("pixels", "knn", folder, options=Options(size=8, classes=(3, 5, 8)))
    assert Image.open(files["--figure"]).width > 600
    assert say(monkeypatch, *words, "--task", "knn,rank", "--json", "-") == 0
    assert [one["task"] for one in json.loads(capsys.readouterr().out)] == ["knn", "rank"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--task", "luck"], "known: equivariance, fidelity, knn"),
        (["--task", "knn,fidelity"], "alone"),
        (["--task", "knn", "--classes", "3,x"], "'x' is no whole number"),
        (["--task", "knn", "--classes", "@nowhere"], "cannot read nowhere"),
        (["--task", "knn", "--figure", "x.pdf"], ".png or .svg"),
        (["--task", "knn,rank", "--figure", "x.png"], "one task"),
        (["--task", "knn", "--figure", "nowhere/x.png"], "nowhere"),
        (["--task", "knn", "--json", "nowhere/x.json"], "--json: there is no folder nowhere"),
        (["--task", "knn", "--json", "."], "--json: . is a folder"),
        ([], "say with --task what to measure of an encoder, a teacher or a model: knn, linear,"),
    ],
)
def test_mistakes_of_the_command_are_said(
    words: list[str],
    said: str,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert say(monkeypatch, "pixels", "--data", str(folder), *words) == 2
    assert said in capsys.readouterr().err


def test_what_is_measured_before_a_mistake_is_kept(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ["pixels", "--data", str(folder), "--size", "8", "--json", str(tmp_path / "x.json")]
    assert say(monkeypatch, *words, "--task", "knn,similarity,rank") == 2
    said = capsys.readouterr()
    assert "neighbours" in said.out and "name the second" in said.err
    assert [one["task"] for one in json.loads((tmp_path / "x.json").read_text())] == ["knn"]
    (tmp_path / "x.json").unlink()
    assert say(monkeypatch, *words, "--task", "similarity,knn") == 2
    assert not capsys.readouterr().out and not (tmp_path / "x.json").exists()


def test_numbers_are_read_from_words_and_files() -> None:
    assert whole_numbers("--sizes", "128, 192") == (128, 192)
    assert whole_numbers("--sizes", None) is None


def test_every_form_of_details_is_drawn_and_laid_out(tmp_path: Path) -> None:
    from radio.evaluation.figures import save_figure
    from radio.evaluation.tables import detail_tables

    many = {f"class {at}": at / 100 for at in range(100)} | {"none": None}
    rows = [{"direction": "to_text", "k": 5, "recall": 0.5, "interval": [0.4, 0.6]}]
    teachers = {"clip": {"e": [0.1, 0.2], "min": 0.1}}
    forms = [
        {"per_class": many},
        {"rows": rows},
        {"teachers": teachers, "sizes": [64, 80]},
        {"features": ["summary"], "nothing": None, "is_on": True},
    ]
    for at, details in enumerate(forms):
        result = Result("task", "me", 0.5, None if at % 2 else (0.4, 0.6), details)
        file = save_figure(result, tmp_path / f"{at}.svg")
        assert (
            "<svg" in file.read_text() and file.read_text() == save_figure(result, file).read_text()
        )
        assert detail_tables(result)
