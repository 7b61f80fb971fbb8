"""The report is one offline file whose numbers are the records' own."""

import base64
import io
import json
import re
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from radio.config import (
    Config,
    DataConfig,
    PartitionConfig,
    StageConfig,
    TeacherCard,
    TeacherConfig,
    to_yaml,
)
from radio.errors import RadioError
from radio.training.figures import MOST_POINTS, curve, panel
from radio.training.report import SIDE, Picture, pca_pictures, write_report

VOID = {"meta", "link", "img", "br", "hr", "input", "path", "use"}


class Page(HTMLParser):
    """What a reader of the page gets: tags with attributes, and the cells of each table."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.tables: dict[str, list[list[tuple[str, dict[str, str]]]]] = {}
        self.open: list[str] = []
        self.text = ""
        self._rows: list[list[tuple[str, dict[str, str]]]] | None = None
        self.feed(html)
        self.close()
        assert not self.open, f"tags left open: {self.open}"

    def handle_starttag(self, tag, attrs):
        attributes = {name: value or "" for name, value in attrs}
        self.tags.append((tag, attributes))
        if tag == "table":
            self._rows = self.tables.setdefault(attributes.get("id", ""), [])
        if tag == "tr" and self._rows is not None:
            self._rows.append([])
        if tag in ("td", "th") and self._rows is not None:
            self._rows[-1].append(("", attributes))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag):
        if tag in VOID:
            return
        assert self.open.pop() == tag
        if tag == "table":
            self._rows = None

    def handle_data(self, data):
        self.text += data
        if self._rows and self._rows[-1] and {"td", "th"} & set(self.open):
            text, attributes = self._rows[-1][-1]
            self._rows[-1][-1] = (text + data).strip(), attributes


def teacher(kind: str, **fields) -> TeacherConfig:
    card = TeacherCard(8, 8, 16, 64, ["native"], 0.1, 0.1, "MIT", "https://example.org/weights")
    return TeacherConfig(kind=kind, card=card, **fields)


def config(*names: str) -> Config:
    views = dict.fromkeys(names, "native")
    return Config(
        out="runs/x",
        data=DataConfig(train="https://example.org/train.tar", val="val.tar"),
        teachers={name: teacher("fake") for name in names},
        stages=[
            StageConfig(4, {"low": PartitionConfig(64, 4, views)}),
            StageConfig(6, {"high": PartitionConfig(128, 2, views)}),
        ],
    )


def step_record(step: int, *names: str, damaged: int = 0) -> dict:
    losses = {f"{name}/{kind}": 1.0 / step for name in names for kind in ("summary", "features")}
    return {
        "step": step,
        "losses": losses,
        "seconds": 0.5,
        "images_per_second": 8.0,
        "wait_share": 0.25,
        "busy_seconds": {name: 0.125 * step for name in names},
        "damaged": damaged,
    }


def row(name: str, size: int, merged: bool, fidelity: float, cosine: float | None) -> dict:
    return {
        "teacher": name,
        "image_size": size,
        "merged": merged,
        "fidelity": fidelity,
        "cosine": cosine,
    }


BEFORE = [
    row("clip", 64, False, 0.7213459, 0.0123456),
    row("clip", 128, False, 0.6987654, -0.0234567),
    row("clip", 128, True, 0.6543219, -0.0345678),
    row("sam", 64, False, 0.5432198, None),
]
AFTER = [
    row("clip", 64, False, 2.3456789, 0.8765432),
    row("clip", 128, False, 1.9876543, 0.7654321),
    row("clip", 128, True, 1.8765432, 0.6543219),
    row("sam", 64, False, 1.5432198, None),
]
RECORDS = [
    {"step": 0, "held_out": BEFORE},
    *(step_record(step, "clip", "sam", damaged=3 if step > 5 else 0) for step in range(1, 11)),
    {"step": 10, "held_out": AFTER},
]


def write_run(run: Path, records: list[dict], names: tuple[str, ...] = ("clip", "sam")) -> Path:
    run.mkdir(parents=True, exist_ok=True)
    (run / "config.yaml").write_text(to_yaml(config(*names)))
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return run


def page_of(run: Path, pictures=()) -> Page:
    return Page(write_report(run, pictures).read_text(encoding="utf-8"))


def picture(*names: str, title: str = "val/0001.jpg") -> Picture:
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (3, 48, 48), generator=generator, dtype=torch.uint8)
    maps = {
        name: (
            torch.randn(8, 4, 4, generator=generator),
            torch.randn(8, 4, 4, generator=generator),
        )
        for name in names
    }
    return Picture(title, image, maps)


def data_image(address: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(address.split(",", 1)[1]))))


def test_headline_numbers_are_those_of_the_records(tmp_path):
    rows = page_of(write_run(tmp_path / "run", RECORDS)).tables["fidelity"][2:]
    assert len(rows) == len(BEFORE)
    for cells, before, after in zip(rows, BEFORE, AFTER, strict=True):
        texts = [text for text, _ in cells]
        assert texts[:3] == [
            before["teacher"],
            f"{before['image_size']} px",
            "merged" if before["merged"] else "",
        ]
        expected = [before["fidelity"], after["fidelity"], before["cosine"], after["cosine"]]
        for (text, attributes), value in zip(cells[3:], expected, strict=True):
            if value is None:
                assert text == "–"
            else:
                assert float(attributes["data-value"]) == value
                assert text == f"{value:.3f}"


def test_speed_damage_and_weights_are_those_of_the_records(tmp_path):
    page = page_of(write_run(tmp_path / "run", RECORDS))
    speed = {cells[0][0]: float(cells[1][1]["data-value"]) for cells in page.tables["speed"][1:]}
    assert speed == {"clip busy": 0.125 * 5.5, "sam busy": 0.125 * 5.5, "the whole step": 0.5}
    assert "3 damaged pictures were met" in " ".join(page.text.split())
    assert [cells[2][0] for cells in page.tables["teachers"][1:]] == ["seeded, untrained"] * 2
    assert [cells[0][0] for cells in page.tables["stages"][1:]] == ["1", "2"]


def test_pretrained_weights_are_named_and_not_called_untrained(tmp_path):
    run = write_run(tmp_path / "run", RECORDS)
    changed = config("clip", "sam")
    changed.teachers = {name: teacher("fake", pretrained="laion2b") for name in ("clip", "sam")}
    (run / "config.yaml").write_text(to_yaml(changed))
    page = page_of(run)
    assert [cells[2][0] for cells in page.tables["teachers"][1:]] == ["pretrained: laion2b"] * 2
    assert "never trained:" not in page.text


def test_the_file_refers_to_nothing_outside_itself(tmp_path):
    path = write_report(write_run(tmp_path / "run", RECORDS), [picture("clip", "sam")])
    html = path.read_text(encoding="utf-8")
    page = Page(html)
    assert "https://example.org/train.tar" in page.text  # shown as text, never fetched
    for tag, attributes in page.tags:
        assert tag not in {"script", "iframe", "object", "embed", "base"}
        for name in ("src", "href", "xlink:href", "srcset", "action", "data", "poster"):
            assert attributes.get(name, "#").startswith(("#", "data:")), (tag, attributes)
        assert "//" not in attributes.get("style", "")
    assert "@import" not in html
    assert set(re.findall(r"url\((.)", html)) <= {"#"}


def test_every_figure_is_whole_and_ids_are_unique(tmp_path):
    html = write_report(write_run(tmp_path / "run", RECORDS)).read_text(encoding="utf-8")
    page = Page(html)
    ids = Counter(attributes["id"] for _, attributes in page.tags if "id" in attributes)
    assert max(ids.values()) == 1
    used = re.findall(r'(?:url\(|href=")#([^")]+)', html)
    assert used and set(used) <= set(ids)
    labels = [attributes["aria-label"] for tag, attributes in page.tags if tag == "svg"]
    assert labels[:2] == ["summary loss over steps", "features loss over steps"]
    assert "#0000f" not in html and "#010203" not in html  # all became the page's own colours


def test_the_same_run_gives_the_same_file(tmp_path):
    run = write_run(tmp_path / "run", RECORDS)
    first = write_report(run, [picture("clip")]).read_bytes()
    assert write_report(run, [picture("clip")]).read_bytes() == first
    assert sorted(path.name for path in run.iterdir()) == [
        "config.yaml",
        "metrics.jsonl",
        "report.html",
    ]


def test_names_are_escaped(tmp_path):
    nasty = '<img src=x onerror="alert(1)">$x$'
    records = [
        {"step": 0, "held_out": [row(nasty, 64, False, 0.5, 0.1)]},
        step_record(1, nasty),
        {"step": 1, "held_out": [row(nasty, 64, False, 1.5, 0.2)]},
    ]
    run = write_run(tmp_path / "a & <b>run", records, (nasty,))
    page = page_of(run, [picture(nasty, title='"><script>alert(2)</script>')])
    assert all("onerror" not in attributes for _, attributes in page.tags)
    assert "script" not in {tag for tag, _ in page.tags}
    assert page.tables["fidelity"][2][0][0] == nasty
    assert "a & <b>run" in page.text
    assert '"><script>alert(2)</script>' in page.text


@pytest.mark.parametrize(
    "records",
    [
        [],
        RECORDS[:1],
        RECORDS[1:2],
        RECORDS[:2],
        RECORDS[1:11],
        RECORDS[-1:],
        [{"step": 0, "held_out": []}, step_record(1)],
    ],
    ids=["empty", "only-before", "one-step", "begun", "no-held-out", "only-after", "no-teachers"],
)
@pytest.mark.parametrize("with_config", [True, False])
def test_any_part_of_a_run_makes_a_report(tmp_path, records, with_config):
    run = write_run(tmp_path / "run", records)
    if not with_config:
        (run / "config.yaml").unlink()
    page = page_of(run)
    measured = any(record.get("held_out") for record in records)
    assert ("fidelity" in page.tables) == measured
    assert ("teachers" in page.tables) == with_config


def test_a_run_measured_only_before_has_no_after(tmp_path):
    rows = page_of(write_run(tmp_path / "run", RECORDS[:3])).tables["fidelity"][2:]
    assert [cells[4][0] for cells in rows] == ["–"] * 4
    assert [cells[3][0] for cells in rows] == [f"{each['fidelity']:.3f}" for each in BEFORE]


def test_a_metrics_file_cut_in_a_line_keeps_the_lines_before(tmp_path):
    run = write_run(tmp_path / "run", RECORDS[:6])
    whole = page_of(run).tables
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(RECORDS[6])[:40])
    assert page_of(run).tables == whole


def test_no_metrics_is_an_error_that_says_what_to_do(tmp_path):
    with pytest.raises(RadioError, match=r"no metrics\.jsonl.*radio train"):
        write_report(tmp_path)


def test_a_broken_config_is_named(tmp_path):
    run = write_run(tmp_path / "run", RECORDS)
    (run / "config.yaml").write_text("no_such_key: 1\n")
    with pytest.raises(RadioError, match=r"config\.yaml.*no_such_key"):
        write_report(run)


def test_pictures_in_the_file_are_the_photograph_and_the_pca(tmp_path):
    shown = picture("clip", "sam")
    page = page_of(write_run(tmp_path / "run", RECORDS), [shown])
    sources = {a["alt"]: data_image(a["src"]) for tag, a in page.tags if tag == "img"}
    assert len(sources) == 5
    assert sources[shown.name].shape == (48, 48, 3)
    for name, (target, predicted) in shown.maps.items():
        theirs, ours = pca_pictures(target, predicted)
        np.testing.assert_array_equal(sources[f"features of {name}"], theirs)
        np.testing.assert_array_equal(sources[f"the student's prediction of {name}"], ours)


def low_rank(rank: int, height: int = 8, width: int = 8, channels: int = 24) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rank)
    spread = torch.tensor([4.0, 2.0, 1.0, 0.5])[:rank]
    scores = torch.randn(height * width, rank, generator=generator) * spread
    directions = torch.linalg.qr(torch.randn(channels, rank, generator=generator)).Q
    flat = scores @ directions.T + torch.randn(channels, generator=generator)
    return flat.T.reshape(channels, height, width)


def test_equal_features_have_equal_pictures_and_others_do_not():
    target = low_rank(3)
    theirs, ours = pca_pictures(target, target.clone())
    assert theirs.shape == (SIDE, SIDE, 3) and theirs.dtype == np.uint8
    np.testing.assert_array_equal(theirs, ours)
    same, other = pca_pictures(target, -target)
    np.testing.assert_array_equal(same, theirs)
    assert np.abs(other.astype(int) - theirs).mean() > 30


def test_prediction_is_drawn_with_the_targets_basis_and_range():
    target = low_rank(4)
    theirs, ours = pca_pictures(target, target.flip(2))
    np.testing.assert_array_equal(ours, theirs[:, ::-1])
    # a mean of its own would draw a shifted prediction like the target itself
    _, shifted = pca_pictures(target, target + 100 * target.std((1, 2), keepdim=True))
    assert len(np.unique(shifted.reshape(-1, 3), axis=0)) == 1
    # a basis or a range of its own would draw a scaled prediction like the target itself
    _, faint = pca_pictures(target, target.mean((1, 2), keepdim=True) + 0.01 * target)
    assert faint.std((0, 1)).max() < 0.1 * theirs.std((0, 1)).min()


def test_colours_are_the_principal_components():
    """Against numpy's eigenvectors of the covariance, signs by the largest entry."""
    target = low_rank(4)
    x = target.double().flatten(1).T.numpy()
    values, vectors = np.linalg.eigh(np.cov(x.T))
    basis = vectors[:, np.argsort(values)[::-1][:3]]
    basis = basis * np.sign(basis[np.abs(basis).argmax(0), range(3)])
    scores = (x - x.mean(0)) @ basis
    low, high = np.quantile(scores, 0.02, axis=0), np.quantile(scores, 0.98, axis=0)
    expected = np.clip((scores - low) / (high - low), 0, 1) * 255
    step = SIDE // 8
    drawn = pca_pictures(target, target)[0][step // 2 :: step, step // 2 :: step]
    assert np.abs(drawn.reshape(-1, 3) - expected).max() <= 0.51


def test_components_that_do_not_exist_are_gray():
    theirs, ours = pca_pictures(low_rank(1), low_rank(2))
    assert theirs[..., 0].std() > 30
    assert (theirs[..., 1:] == 128).all() and (ours[..., 1:] == 128).all()
    flat, other = pca_pictures(torch.full((8, 4, 4), 0.1), torch.randn(8, 4, 4))
    assert (flat == 128).all() and (other == 128).all()


def test_one_odd_position_among_equal_ones_is_seen():
    target = torch.zeros(8, 16, 16)
    target[:, 3, 5] = 1.0
    theirs, _ = pca_pictures(target, target)
    step = SIDE // 16
    assert theirs[3 * step, 5 * step, 0] == 255 and theirs[0, 0, 0] == 0


def test_grids_that_are_not_square_or_not_alike_keep_their_shape():
    theirs, ours = pca_pictures(low_rank(3, 6, 12), low_rank(3, 4, 8))
    assert theirs.shape == ours.shape == (SIDE // 2, SIDE, 3)
    assert len(np.unique(theirs.reshape(-1, 3), axis=0)) <= 6 * 12
    one, _ = pca_pictures(low_rank(3, 1, 1), low_rank(3, 1, 1))
    assert one.shape == (SIDE, SIDE, 3)


def test_long_curves_are_thinned_without_losing_weight():
    steps = range(1, 10 * MOST_POINTS + 1)
    drawn_steps, values = curve(steps, [float(step) for step in steps])
    assert len(values) == MOST_POINTS
    assert drawn_steps[-1] == steps[-1]
    assert np.mean(values) == pytest.approx(np.mean(steps))
    assert curve([1, 2, 3], [0.5, None, 0.25]) == ([1, 3], [0.5, 0.25])


@pytest.mark.parametrize(
    ("values", "logarithmic"),
    [
        ([1.0, 0.01], True),
        ([1.0, 0.1], True),
        ([1.0, 0.2], False),
        ([1.0, 0.0], False),
        ([1.0, float("nan"), 0.4], False),
    ],
)
def test_only_curves_that_fall_far_are_logarithmic(values, logarithmic):
    svg = panel("loss", {"clip": (list(range(len(values))), values)})["svg"]
    ticks = [float(text) for text in re.findall(r"text-anchor: end[^>]*>([\d.]+)</text>", svg)]
    assert len(ticks) >= 3
    gaps = np.diff(ticks)
    assert (not np.allclose(gaps, gaps[0])) == logarithmic


def test_the_students_average_has_a_curve_and_is_no_teacher(tmp_path):
    records = [
        {**record, "losses": {**record["losses"], "average/mesa": 0.1}}
        if "losses" in record
        else record
        for record in RECORDS
    ]
    page = page_of(write_run(tmp_path / "run", records))
    text = " ".join(page.text.split())
    assert "from 2 frozen teachers: clip, sam." in text
    assert "mesa loss" in text and text.count("average") >= 1
