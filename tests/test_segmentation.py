"""The linear probe of pixels, against torchmetrics and scikit-learn."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torchmetrics.classification import MulticlassConfusionMatrix, MulticlassJaccardIndex

from radio.errors import RadioError
from radio.evaluation import segmentation as module
from radio.evaluation.label_maps import IGNORED, label_maps
from radio.evaluation.pictures import Pictures
from radio.evaluation.result import Options
from radio.evaluation.segmentation import (
    at_places,
    class_ious,
    confusion,
    confusions,
    fit_probe,
    mean_iou,
    segmentation,
)
from radio.evaluation.targets import resolve

CLASSES = "0\tsky\t\n1\tground\t\n2\tcar\t\n7\tvoid\tignore\n"
COLOURS = np.array([[90, 140, 250], [90, 90, 90], [230, 30, 20]])


def png(values: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray(values).save(out, "PNG")
    return out.getvalue()


def scene(seed: int, side: tuple[int, int] = (48, 64)) -> tuple[np.ndarray, np.ndarray]:
    """Return a picture of coloured regions and its map: sky over ground, a car, some void."""
    rng = np.random.default_rng(seed)
    labels = np.zeros(side, np.uint8)
    labels[side[0] // 2 + rng.integers(-6, 6) :] = 1
    row, column = rng.integers(24, 32), rng.integers(4, 40)
    labels[row : row + 12, column : column + 16] = 2
    picture = COLOURS[labels] + rng.normal(0, 8, (*side, 3))
    labels[:3] = 7
    labels[-3:] = 255
    return picture.clip(0, 255).astype(np.uint8), labels


def write(folder: Path, name: str, samples: dict[str, bytes]) -> None:
    with tarfile.open(folder / name, "w") as tar:
        for member, data in samples.items():
            info = tarfile.TarInfo(member)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RADIO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(module, "STEPS", 80)
    folder = tmp_path / "scenes"
    folder.mkdir()
    (folder / "classes.txt").write_text(CLASSES)
    for split, count in (("train", 6), ("val", 4)):
        samples = {}
        for at in range(count):
            picture, labels = scene(at + (100 if split == "val" else 0))
            samples |= {f"{at:06}.jpg": png(picture), f"{at:06}.png": png(labels)}
        write(folder, f"{split}-000000.tar", samples)
    return folder


def test_colours_are_told_apart_and_the_judge_agrees(data: Path):
    result = segmentation(resolve("pixels"), Pictures(data), Options(size=64))
    assert result.score > 0.8
    assert set(result.details["per_class"]) == {"sky", "ground", "car"}
    assert result.details["ignored_values"] == [7, 255]
    low, high = result.interval
    assert low <= result.score <= high
    judge = MulticlassJaccardIndex(3, average="macro", ignore_index=IGNORED)
    probe = fit_probe(*_pixel_maps(data, "train"), 3, 0)
    maps, labels = _pixel_maps(data, "val")
    for one, wanted in zip(maps, labels, strict=True):
        logits = F.interpolate(probe.logits(one[None]), wanted.shape, mode="bilinear")
        judge.update(logits.argmax(1), torch.from_numpy(wanted.astype(np.int64))[None])
    assert result.score == pytest.approx(float(judge.compute()), abs=1e-6)
    assert mean_iou(result.samples) == result.score
    again = segmentation(resolve("pixels"), Pictures(data), Options(size=64))
    assert again.as_dict() == result.as_dict()


def _pixel_maps(data: Path, split: str) -> tuple[torch.Tensor, list[np.ndarray]]:
    from radio.evaluation.features import features_of

    pictures = Pictures(data)
    maps = features_of(resolve("pixels"), pictures.split(split), "features", 64)
    return maps, getattr(label_maps(pictures, Options()), split)


def test_confusion_and_iou_are_torchmetrics():
    rng = np.random.default_rng(0)
    wanted = rng.integers(0, 5, (30, 40)).astype(np.uint8)
    wanted[rng.random((30, 40)) < 0.2] = IGNORED
    wanted[wanted == 3] = 2  # class 3 is never labelled
    predicted = rng.integers(0, 5, (30, 40))
    ours = confusion(wanted, predicted, 5)
    args = torch.from_numpy(predicted)[None], torch.from_numpy(wanted.astype(np.int64))[None]
    judge = MulticlassConfusionMatrix(5, ignore_index=IGNORED)
    assert np.array_equal(ours, judge(*args).numpy())
    each = MulticlassJaccardIndex(5, average="none", ignore_index=IGNORED)(*args).numpy()
    assert np.allclose(class_ious(ours), each)
    assert mean_iou(ours[None]) == pytest.approx(each[[0, 1, 2, 4]].mean())


def test_a_drawn_pixel_sees_what_the_resized_map_has_there():
    maps = torch.randn(2, 3, 5, 7, generator=torch.Generator().manual_seed(0))
    whole = F.interpolate(maps, (33, 21), mode="bilinear", align_corners=False)
    rows, columns = torch.meshgrid(torch.arange(33), torch.arange(21), indexing="ij")
    places = torch.stack([(2 * columns + 1) / 21 - 1, (2 * rows + 1) / 33 - 1], -1)
    read = at_places(maps, places.reshape(1, -1, 2).expand(2, -1, -1).float())
    assert torch.allclose(read.reshape(whole.shape), whole, atol=1e-5)


def test_the_probe_nears_the_convex_optimum(monkeypatch: pytest.MonkeyPatch):
    """One cell a picture: the loss is that of logistic regression, which scikit-learn solves."""
    from sklearn.linear_model import LogisticRegression

    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 600)
    means = np.array([[2, 0], [0, 2], [-1, -1]])
    rows = (means[labels] + rng.normal(0, 1, (600, 2))) * [100, 0.01] + [5, 3]
    maps = torch.from_numpy(rows).float()[:, :, None, None]
    monkeypatch.setattr(module, "PIXELS", 2)
    monkeypatch.setattr(module, "PICTURES", 128)
    monkeypatch.setattr(module, "STEPS", 150)
    monkeypatch.setattr(module, "RATE", 0.2)
    probe = fit_probe(maps, [np.full((2, 2), label, np.uint8) for label in labels], 3, 0)
    ours = probe.logits(maps).flatten(1).argmax(1).numpy()
    scaled = (rows - rows.mean(0)) / rows.std(0)
    judge = LogisticRegression(C=1e6).fit(scaled, labels)
    assert (ours == judge.predict(scaled)).mean() > 0.97
    loss = F.cross_entropy(probe.logits(maps).flatten(1), torch.from_numpy(labels))
    best = -np.log(judge.predict_proba(scaled)[np.arange(600), labels]).mean()
    assert float(loss) < best + 0.02


def test_channels_that_say_nothing_do_no_harm(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "STEPS", 5)
    maps = torch.zeros(4, 2, 4, 4)
    maps[:, 1] = 1e6
    labels = [np.zeros((8, 8), np.uint8) for _ in range(4)]
    probe = fit_probe(maps, labels, 2, 0)
    assert torch.isfinite(probe.logits(maps)).all()
    assert confusions(probe, maps, labels).sum() == 4 * 64


def test_classes_limit_what_is_learnt_and_scored(data: Path):
    result = segmentation(resolve("pixels"), Pictures(data), Options(size=64, classes=(0, 1)))
    assert set(result.details["per_class"]) == {"sky", "ground"}
    maps = label_maps(Pictures(data), Options(classes=(1, 0)))
    assert maps.names == ("ground", "sky") and set(np.unique(maps.val[0])) <= {0, 1, IGNORED}


def test_ignore_can_be_named(data: Path):
    maps = label_maps(Pictures(data), Options(ignore=2))
    assert maps.names == ("sky", "ground", "void") and maps.ignored == (2, 255)


def test_maps_of_a_value_that_is_no_class_are_refused(data: Path):
    picture, labels = scene(0)
    labels[20, 20] = 9
    write(data, "val-000000.tar", {"a.jpg": png(picture), "a.png": png(labels)})
    with pytest.raises(RadioError, match=r"sample 'a'.*value 9.*neither a class"):
        label_maps(Pictures(data), Options())


def test_instance_maps_are_no_label_maps(data: Path):
    picture, labels = scene(0)
    listed = b'{"instances": [{"id": 1, "class": 2}]}'
    write(data, "train-000000.tar", {"a.jpg": png(picture), "a.png": png(labels), "a.json": listed})
    with pytest.raises(RadioError, match=r"map of instances \(instance 1 is of class 2\)"):
        label_maps(Pictures(data), Options())


def test_what_cannot_be_probed_says_why(data: Path):
    target = resolve("pixels")
    with pytest.raises(RadioError, match="one vector a picture"):
        segmentation(target, Pictures(data), Options(features="summary", size=64))
    with pytest.raises(RadioError, match="class 9 is not in"):
        segmentation(target, Pictures(data), Options(classes=(0, 9)))
    with pytest.raises(RadioError, match="not finite"):
        fit_probe(torch.full((1, 1, 2, 2), torch.nan), [np.zeros((2, 2), np.uint8)], 2, 0)
    with pytest.raises(RadioError, match="no pixel of the train maps is labelled"):
        fit_probe(torch.zeros(1, 1, 2, 2), [np.full((2, 2), IGNORED, np.uint8)], 2, 0)
    (data / "classes.txt").unlink()
    with pytest.raises(RadioError, match=r"has no classes\.txt"):
        segmentation(target, Pictures(data), Options())
