"""The findings' declarations, statistics, stream and page; one arm is really trained."""

from __future__ import annotations

import functools
import json
import shutil
from dataclasses import asdict, field, make_dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import torch
from data_folder import coloured, write_split
from picture_zoo import saved
from PIL import Image
from tiny import tiny_config

from benchmarks.findings import layers, token_merging
from benchmarks.findings.__main__ import FINDINGS, main
from benchmarks.findings.compare import (
    AGREES,
    DISAGREES,
    NOT_RESOLVED,
    compare,
    metrics_of,
    over_pictures,
    over_seeds,
    verdict,
    with_ranks,
)
from benchmarks.findings.declare import HIGHER, LOWER, RANK, Arm, Comparison, Finding, Side
from benchmarks.findings.material import SHARES, put_together
from benchmarks.findings.measures import STATISTICS, Samples
from benchmarks.findings.records import Record, as_text, path_of, read, take
from benchmarks.findings.report import write_report
from benchmarks.findings.shared_stream import SharedStream
from benchmarks.findings.standardizers import OURS_SCALED, REAL
from benchmarks.findings.trained import Workshop, identity
from radio.config import OptimizerConfig
from radio.data.configured import training_plan
from radio.errors import RadioError
from radio.evaluation import segmentation
from radio.evaluation.result import paired_bootstrap
from radio.targets.fit import fit, read_fitted
from radio.targets.stream import LocalStream
from radio.targets.target_maker import Request

ARMS = [(name, arm) for name, finding in FINDINGS.items() for arm in finding.arms]


@pytest.mark.parametrize("name", FINDINGS)
def test_every_finding_declares_what_is_needed(name: str) -> None:
    finding = FINDINGS[name]
    arms = [arm.name for arm in finding.arms]
    assert len(set(arms)) == len(arms) > 0
    assert finding.title and finding.claim and finding.how and finding.measure
    assert finding.tables and finding.label and bool(finding.points) != bool(finding.lines)
    assert bool(finding.lines) == bool(finding.across)
    assert finding.comparisons
    for each in finding.comparisons:
        assert each.first.arm in arms and each.second.arm in arms
        assert each.first != each.second
        assert each.paper in (HIGHER, LOWER, None)
    assert any(each.paper for each in finding.comparisons)


def test_the_claims_are_eight_findings_and_a_second_look_at_the_scales(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert len(FINDINGS) == 9
    assert main(["tilings"]) == 2
    assert "known: tiling, mode_switch" in capsys.readouterr().err


def halves(side: int) -> Image.Image:
    """A label map of classes 3 and 5."""
    values = np.full((side, side), 3, np.uint8)
    values[:, side // 2 :] = 5
    return Image.fromarray(values)


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    """A workshop of a few noisy pictures in every set, and the demo's teachers."""
    root = tmp_path_factory.mktemp("findings")
    rng = np.random.default_rng(0)
    for name in SHARES:
        folder = root / "data" / name
        folder.mkdir(parents=True)
        for split, count in (("train", 24), ("val", 3)):
            samples = [
                {
                    "jpg": saved(coloured((3, 5, 8)[n % 3], rng, 48), "JPEG"),
                    "cls": str((3, 5, 8)[n % 3]).encode(),
                    "png": saved(halves(48)),
                }
                for n in range(count)
            ]
            write_split(folder, split, samples)
        (folder / "classes.txt").write_text("3\tn3\tred\n5\tn5\tgreen\n8\tn8\tblue\n")
    overrides = ("fit.steps=1", "optimizer.warmup_steps=1", "data.micro_batch=4")
    material = put_together(root / "data", root / "material")
    return Workshop(root / "work", material, "demo", 2, overrides)


def test_material_is_put_together_once(workshop: Workshop, tmp_path: Path) -> None:
    material = workshop.material
    assert len(material.pictures.split("train")) == 24 * len(SHARES)
    keys = material.pictures.split("val").keys
    assert len(keys) == 3 * len(SHARES) and keys[0] == "tiny-imagenet-100/000000"
    assert material.classes.split("train").labels().tolist()[:3] == [3, 5, 8]
    folder = material.pictures.folder
    before = sorted(folder.iterdir())
    again = put_together(material.streets.folder.parent, folder.parent)
    assert again.train == material.train and sorted(folder.iterdir()) == before
    with pytest.raises(RadioError, match="--data"):
        put_together(folder, folder.parent / "other")
    others = tmp_path / "data"
    shutil.copytree(material.streets.folder.parent, others)
    shutil.copy(others / "camvid" / "val-000000.tar", others / "flickr8k" / "val-000000.tar")
    with pytest.raises(RadioError, match="--work"):
        put_together(others, folder.parent)


def test_arms_resolve_and_those_that_say_the_same_share_a_run(workshop: Workshop) -> None:
    config_of = functools.cache(lambda overrides: workshop.config(Arm("any", overrides), 1))
    outs = {}
    for name, arm in ARMS:
        scaled = "scaled/" if arm.deviations else ""
        outs[name, arm.name] = scaled + config_of(arm.overrides).out
    base = outs["tiling", "student"]
    shared = {key for key, out in outs.items() if out == base}
    assert shared == {
        ("tiling", "student"),
        ("mode_switch", "all at all"),
        ("mosaic", "mosaic"),
        ("leave_one_out", "all"),
        ("token_merging", "student"),
        ("layers", "student"),
    }
    kinds = [arm.name for arm in FINDINGS["standardizers"].arms if arm.name != "identity"]
    assert all(outs["standardizers", kind] == outs["deviations", kind] for kind in kinds)
    assert len(set(outs.values())) == len(outs) - (len(shared) - 1) - len(kinds)
    scaled = FINDINGS["deviations"].arms[-1]
    assert workshop.config(scaled, 1).out not in outs.values(), "scaled teachers are others"
    config = config_of(FINDINGS["leave_one_out"].arms[4].overrides)
    assert "sam" not in config.teachers and config.seed == 1 and config.stages[0].steps == 2
    counts = [
        sum(part.batch for part in config_of(arm.overrides).stages[0].partitions.values())
        for arm in FINDINGS["partitions"].arms
    ]
    assert set(counts) == {16}


def test_a_run_of_teachers_with_other_weights_is_another(
    workshop: Workshop, tmp_path: Path
) -> None:
    config = workshop.config(Arm("any"), 0)
    weights = tmp_path / "clip.safetensors"
    found = set()
    for content in (b"old", b"new"):
        weights.write_bytes(content)
        config.teachers["clip"].pretrained = str(weights)
        found.add(identity(config, Arm("any")))
    assert len(found) == 2


def test_what_a_later_version_may_choose_too_makes_no_run_another(workshop: Workshop) -> None:
    later = make_dataclass("Later", [("gain", float, field(default=1.0))], bases=(OptimizerConfig,))
    config = workshop.config(Arm("any"), 0)
    known = identity(config, Arm("any"))
    values = asdict(config.optimizer)
    assert identity(replace(config, optimizer=later(**values)), Arm("any")) == known
    other = later(**values, gain=2.0)
    assert identity(replace(config, optimizer=other), Arm("any")) != known


def test_the_interval_over_seeds_is_scipys_paired_t() -> None:
    a, b = np.array([0.31, 0.42, 0.40]), np.array([0.28, 0.41, 0.33])
    theirs = scipy.stats.ttest_rel(a, b).confidence_interval(0.95)
    assert over_seeds(list(a - b)) == pytest.approx((theirs.low, theirs.high))
    assert over_seeds([0.3]) is None
    assert over_seeds([0.5, 0.5]) == (0.5, 0.5)


def test_the_interval_over_pictures_is_the_paired_bootstrap_for_one_seed() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.random((40, 2)) + 0.5, rng.random((40, 2)) + 0.4
    for name in ("fidelity", "explained"):
        ours = over_pictures([Samples(a, name)], [Samples(b, name)])
        assert ours == pytest.approx(paired_bootstrap(a, b, STATISTICS[name]))
    several = over_pictures([Samples(a[:, 0])] * 3, [Samples(b[:, 0])] * 3)
    assert several == pytest.approx(paired_bootstrap(a[:, 0], b[:, 0]))
    for name, statistic in STATISTICS.items():
        shape = {"evenness": (40, 3, 2), "mean_iou": (40, 3, 3)}.get(name, (40, 2))
        rows = rng.random(shape[: 1 if name == "mean" else 3]) + 0.1
        times = rng.integers(0, 3, 40)
        repeated = Samples(np.repeat(rows, times, axis=0), name)
        weighted = Samples(rows, name).score(times * (40 / times.sum()))
        assert weighted == pytest.approx(repeated.score()) != statistic(rows)
    with pytest.raises(RadioError, match="the same ones"):
        over_pictures([Samples(a)], [Samples(b[:-1])])
    assert over_pictures([Samples(a), None], [Samples(b), Samples(b)]) is None


@pytest.mark.parametrize(
    ("difference", "found", "paper", "word"),
    [
        (0.2, [(0.1, 0.3), None], HIGHER, AGREES),
        (0.2, [(0.1, 0.3), (0.1, 0.2)], LOWER, DISAGREES),
        (-0.2, [(-0.3, -0.1), (-0.2, -0.1)], LOWER, AGREES),
        (0.2, [(-0.1, 0.5), (0.1, 0.2)], HIGHER, NOT_RESOLVED),
        (0.2, [(0.1, 0.3), (-0.1, 0.4)], HIGHER, NOT_RESOLVED),
        (0.2, [None, (0.1, 0.2)], HIGHER, NOT_RESOLVED),
        (0.0, [(0.0, 0.0), None], HIGHER, NOT_RESOLVED),
        (0.2, [(0.1, 0.3), None], None, "higher"),
    ],
)
def test_verdicts_are_computed(difference, found, paper, word) -> None:
    assert verdict(difference, found, paper) == word


def test_what_few_tokens_keep() -> None:
    coarse = torch.randn(2, 5, 4, 4, generator=torch.Generator().manual_seed(0))
    blocks = coarse.repeat_interleave(4, 2).repeat_interleave(4, 3).flatten(2).transpose(1, 2)
    noise = torch.randn(2, 256, 5, generator=torch.Generator().manual_seed(1))
    for way in token_merging.WAYS.values():
        whole = way(noise, 256, 0)
        assert torch.equal(whole, noise) or torch.allclose(whole, noise, atol=1e-6)
        found = way(noise, 16, 0)
        assert all(len(each.unique(dim=0)) <= 16 for each in found)
    for name in ("merged", "pooled"):  # 16 squares of one value are 16 tokens
        found = token_merging.WAYS[name](blocks, 16, 0)
        assert torch.allclose(found, blocks, atol=1e-6), name
        spread, left = token_merging.kept(blocks, found).sum(axis=0)
        assert left < 1e-9 * spread
        assert spread == pytest.approx(float(blocks.double().var((0, 1)).sum()) * 511, rel=1e-6)


def test_the_shared_stream_is_the_local_one_standardized_afterwards(tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    config.codec = "float32"
    spec = training_plan(config, 24)(0)
    with LocalStream(config) as local:
        files = fit(config, local)
        request = Request("train", "float32", files)
        (wanted,) = local.read([spec], request)
    shared = SharedStream(config)
    (found,) = shared.read([spec], request)
    for one, other in zip(found.partitions, wanted.partitions, strict=True):
        assert torch.equal(one.images, other.images)
        for name, target in other.targets.items():
            assert torch.allclose(one.targets[name].features, target.features, atol=1e-4)
    assert shared.teachers == local.teachers


def test_teachers_are_scaled_to_the_deviations_that_are_asked_for(tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    for teacher in config.teachers.values():
        teacher.standardizer = "global_scale"
    wanted = {"words": 0.03, "parts": 1.5, "edges": 5.5}
    stream = SharedStream(config, wanted)
    fitted = read_fitted(fit(config, stream))
    for name, deviation in wanted.items():
        assert float(fitted[name].inverse[0, 0]) == pytest.approx(deviation, rel=1e-4)
        assert stream.teachers[name].fingerprint != stream.inner.teachers[name].fingerprint


def toy(patterns: tuple[str, ...] = ("good", "cost")) -> Finding:
    comparisons = (
        Comparison(Side("a", "good"), Side("b", "good"), HIGHER),
        Comparison(Side("a", "good"), Side("c", "good"), HIGHER),
        Comparison(Side("a", "cost"), Side("b", "cost"), HIGHER),
        Comparison(Side("a", "good"), Side("never", "good"), HIGHER),
    )
    return Finding(
        "A toy: b, or a?",
        "a is better.",
        "Made up.",
        lambda _: {},
        comparisons,
        {"all": patterns},
        "good",
        points=("good",),
        arms=(Arm("a"), Arm("b"), Arm("c")),
        ranked=("good",),
    )


def write_records(out: Path, name: str = "toy") -> None:
    """Records of which a is above b, c is anywhere, and a's cost lies below b's."""
    rng = np.random.default_rng(0)
    means = {"a": (0.8, 0.8, 0.8), "b": (0.3, 0.3, 0.3), "c": (0.5, 0.9, 0.8)}
    for arm, levels in means.items():
        for seed, level in enumerate(levels):
            rows = (rng.random(200) < level).astype(int)
            cost = {"a": 1.0, "b": 2.0, "c": 3.0}[arm]
            said = {"arm": arm, "seed": seed, "steps": 2, "images": 36, "commit": "abc"}
            said |= {"deviations": None, "family": {"clip": "f" * 64}, "seconds": {"train": 3.2}}
            path = path_of(out, name, arm, seed)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(as_text(said, {"cost": cost, "good": Samples(rows)}))


def test_the_page_says_what_the_records_do(tmp_path: Path) -> None:
    write_records(tmp_path / "out")
    (tmp_path / "docs").mkdir()
    page = tmp_path / "docs" / "page.md"
    write_report({"toy": toy()}, tmp_path / "out", page)
    text = page.read_text()
    lines = {line.split(" | ")[1]: line for line in text.splitlines() if line.startswith("| a: g")}
    assert AGREES in lines["b: good"] and NOT_RESOLVED in lines["c: good"]
    cost = next(line for line in text.splitlines() if line.startswith("| a: cost"))
    assert DISAGREES in cost and "-1.000 | [-1.000, -1.000] | – |" in cost
    assert "disagrees in: a: cost is below b: cost" in text
    assert "1 agrees, 1 disagrees, 1 not resolved" in text
    assert "never" not in text.replace(" is never", "")
    assert "seeds 0, 1, 2" in text and "36 pictures a run" in text and "commit abc" in text
    svg = (tmp_path / "docs" / "figures" / "findings_toy.svg").read_bytes()
    write_report({"toy": toy()}, tmp_path / "out", page)
    assert (tmp_path / "docs" / "figures" / "findings_toy.svg").read_bytes() == svg
    assert page.read_text() == text


def test_one_seed_resolves_nothing_and_a_finding_without_records_is_left_out(
    tmp_path: Path,
) -> None:
    write_records(tmp_path)
    for path in (tmp_path / "toy").glob("*-[12].json"):
        path.unlink()
    finding = toy()
    records = read(tmp_path, "toy", finding)
    assert [record.arm for record in records] == ["a", "b", "c"]
    found = compare(finding.comparisons[0], records)
    assert found is not None and found.verdict == NOT_RESOLVED and found.seeds is None
    with pytest.raises(RadioError, match="no records"):
        write_report({"other": finding}, tmp_path, tmp_path / "page.md")


def test_records_of_other_teachers_are_not_put_into_one_table(tmp_path: Path) -> None:
    write_records(tmp_path)
    path = path_of(tmp_path, "toy", "b", 1)
    other = path.read_text().replace("f" * 64, "e" * 64)
    path.write_text(other)
    with pytest.raises(RadioError, match="records of other family"):
        read(tmp_path, "toy", toy())
    path.write_text(other.replace('"deviations": null', '"deviations": {"clip": 0.03}'))
    assert len(read(tmp_path, "toy", toy())) == 9, "an arm of scaled teachers beside the others"


def test_ranks_are_scipys() -> None:
    values = {"a": (0.1, 0.5), "b": (0.3, 0.5), "c": (0.2, 0.9)}
    records = [
        Record(arm, seed, {"good": value}, {}, {})
        for arm, several in values.items()
        for seed, value in enumerate(several)
    ]
    columns = np.array(list(values.values()))
    wanted = scipy.stats.rankdata(-columns, axis=0)
    for record in with_ranks(toy(), records):
        assert record.scores[RANK] == wanted["abc".index(record.arm), record.seed]
    alone = Record("d", 0, {"good": 0.4}, {}, {})
    ranked = with_ranks(replace(toy(), unranked=("d",)), [*records, alone])
    assert RANK not in ranked[-1].scores and ranked[:-1] == with_ranks(toy(), records)
    ranked = with_ranks(toy(), [*records, alone])
    assert [RANK in record.scores for record in ranked] == [True, False] * 3 + [True]


SMALL = ("stages.0.partitions.low.batch=4", "stages.0.partitions.high.batch=1")


@pytest.mark.slow
@pytest.mark.parametrize("name", FINDINGS)
def test_an_arm_of_every_finding_is_measured(
    name: str, workshop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RADIO_CACHE", str(workshop.folder / "features"))
    monkeypatch.setattr(segmentation, "STEPS", 5)
    monkeypatch.setattr(layers, "STEPS", 5)
    quick = replace(workshop, overrides=(*workshop.overrides, *SMALL))
    finding = FINDINGS[name]
    arm = finding.arms[0]
    assert take(name, finding, quick, 0, arm, tmp_path)
    (record,) = read(tmp_path, name, finding)
    wanted = {
        side.metric
        for each in finding.comparisons
        for side in (each.first, each.second)
        if side.arm == arm.name
    }
    assert wanted and wanted - {RANK} <= set(record.scores)
    patterns = [*finding.points, *finding.lines, *(p for t in finding.tables.values() for p in t)]
    assert all(metrics_of([pattern], [record]) for pattern in patterns if pattern != RANK)
    (tmp_path / "docs").mkdir()
    write_report({name: finding}, tmp_path, tmp_path / "docs" / "page.md")
    assert finding.title in (tmp_path / "docs" / "page.md").read_text()


@pytest.mark.slow
def test_an_arm_is_trained_measured_and_kept(
    workshop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RADIO_CACHE", str(tmp_path / "features"))
    quick = replace(workshop, overrides=(*workshop.overrides, *SMALL))
    finding = FINDINGS["deviations"]
    (arm,) = (arm for arm in finding.arms if arm.name == OURS_SCALED)
    assert take("deviations", finding, quick, 0, arm, tmp_path)
    (record,) = read(tmp_path, "deviations", finding)
    assert record.said["steps"] == 2 and record.said["images"] == 10
    for name, deviation in REAL.items():
        assert deviation / 3 < record.scores[f"before/{name}"] < 3 * deviation
        for size in (128, 256):
            assert 0 < record.scores[f"fidelity/{name}@{size}"] < 2
    assert 0 <= record.scores["knn"] <= 1 and len(record.samples["knn"].rows) == 3
    assert not take("deviations", finding, quick, 0, arm, tmp_path), "it is there already"
    said = json.loads(path_of(tmp_path, "deviations", OURS_SCALED, 0).read_text())
    assert {"commit", "machine", "versions", "overrides", "seconds", "scores"} <= set(said)
