"""The quality benchmark: its plan, its arithmetic, and the page that it writes from JSON."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data_folder import write_folder
from small_encoder import small_weights
from tiny import tiny_config

from benchmarks.quality import measure as measure_module
from benchmarks.quality.__main__ import arguments, main
from benchmarks.quality.compare import (
    Side,
    chance_of,
    difference,
    kept_of,
    retention,
    statistic_of,
)
from benchmarks.quality.jobs import (
    COCO,
    PEOPLE,
    ROWS,
    TEXT,
    TINY,
    Job,
    Setting,
    Subject,
    TeacherFacts,
    subjects_of,
    teachers_called,
)
from benchmarks.quality.measure import Measurer, cost_of, decoder_print
from benchmarks.quality.page import page
from benchmarks.quality.store import Stored, read_stored, write_record
from benchmarks.quality.verdicts import Verdict, verdicts
from benchmarks.quality.words import COMMANDS, HOW
from radio import cli, load_config
from radio.errors import RadioError
from radio.evaluation import command as command_module
from radio.evaluation.result import Options, Result, bootstrap, mean
from radio.evaluation.target_kinds import EncoderTarget, PixelsTarget
from radio.evaluation.targets import resolve
from radio.training.checkpoint import Checkpoint
from radio.training.cost import vit_gflop
from teachers.weights import POCKET

TEACHERS = {
    "clip": TeacherFacts(128, False, True),
    "siglip": TeacherFacts(160, False, True),
    "dinov2": TeacherFacts(128, True, True),
    "sam": TeacherFacts(256, False, False),
}
SETTING = Setting("pocket", TEACHERS, (1, 4), (0, 2, 3))
SUBJECTS = subjects_of(SETTING, "pocket", "runs/random", ["runs/p/checkpoints/step-000010"])


# What is measured


def test_the_pocket_teachers_are_what_their_yaml_says() -> None:
    found = teachers_called("demo")
    assert list(found) == ["clip", "siglip", "dinov2", "sam"]
    assert found["dinov2"].sizes == (224, 448, 896) and found["sam"].sizes == (256,)
    assert not found["sam"].has_summary and teachers_called("nobody") == {}


def test_no_two_jobs_of_a_subject_share_a_file() -> None:
    for subject in SUBJECTS:
        names = [job.name for job in SETTING.jobs(subject)]
        assert names and len(set(names)) == len(names), subject


def test_the_student_is_beside_every_teacher_at_its_size() -> None:
    def of(label: str) -> set[tuple[str, int | None, str]]:
        (subject,) = (s for s in SUBJECTS if s.label == label)
        return {(job.row.name, job.size, job.tag) for job in SETTING.jobs(subject)}

    for adaptor in TEACHERS:
        for row, size, _ in of(f"pocket_{adaptor}"):
            tag = adaptor if ROWS[row].of in ("text", "masks") else ""
            if row in ("rank", "scale"):
                continue
            assert (row, size, tag) in of("student"), (adaptor, row)
            if ROWS[row].of != "else":
                assert (row, size, tag) in of("control"), (adaptor, row)
    assert ("zero-shot-held-out", 160, "siglip") in of("step-000010")
    assert {row for row, _, _ in of("constant")} == {r for r in ROWS if r.startswith("masks")}
    assert ("camvid", 256, "") in of("pixels")


def test_every_command_means_the_options_that_were_measured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[Any] = []

    def caught(*given: Any) -> Any:
        seen.append(given)
        return {}, [], None

    monkeypatch.setattr(command_module, "run", caught)
    student = SETTING.jobs(Subject("student", "pocket", "student"))
    control = SETTING.jobs(Subject("control", "runs/control", "control"))
    tokenizers = {job.options.get("tokenizer") for job in control if job.row.of == "text"}
    assert tokenizers == {f"teachers/pocket/{name}" for name in TEXT if name in TEACHERS}
    assert not any("tokenizer" in job.options for job in student)
    for job in {(job.row.name, bool(job.tag)): job for job in student}.values():
        words = job.command("it", "sets").split()
        cli.app(words[1:], standalone_mode=False)
        target, tasks, data, options, _ = seen[-1]
        assert (target, tasks) == ("it", [job.row.task])
        assert data == f"sets/{job.row.data}"
        assert options == Options(**job.all_options), job


# Arithmetic


def test_retention_is_the_hand_computed_share_with_the_same_weights_of_pictures() -> None:
    rng = np.random.default_rng(3)
    floor, teacher, student = (rng.random(40) + shift for shift in (0.0, 1.0, 0.6))
    found = retention(*(Side(v.mean(), v) for v in (student, teacher, floor)), mean)
    expected = (student.mean() - floor.mean()) / (teacher.mean() - floor.mean())
    assert found.share == pytest.approx(expected)
    shares = []
    for weights in np.random.default_rng(0).standard_exponential((1000, 40)):
        s, t, f = (np.average(values, weights=weights) for values in (student, teacher, floor))
        shares.append((s - f) / (t - f))
    assert found.interval == pytest.approx(tuple(np.percentile(shares, (2.5, 97.5))))
    chance = retention(Side(0.4, student * 0 + 0.4), Side(0.6, teacher * 0 + 0.6), Side(0.2), mean)
    assert chance.share == pytest.approx(0.5)
    assert chance.interval == pytest.approx((0.5, 0.5))


def test_a_teacher_that_is_not_above_the_floor_keeps_nothing() -> None:
    rows = np.random.default_rng(0).integers(0, 2, 30).astype(float)
    assert retention(Side(0.5, rows), Side(0.4, rows), Side(0.4), mean).share is None
    barely = retention(Side(0.5, rows), Side(rows.mean(), rows), Side(rows.mean() - 0.01), mean)
    assert barely.share is not None and barely.interval is None
    with pytest.raises(RadioError, match="30, 29 pictures"):
        retention(Side(0.5, rows), Side(0.9, rows[1:]), Side(0.4), mean)


def test_the_guess_of_a_retrieval_is_that_of_random_orders(tmp_path: Path) -> None:
    store(tmp_path, "pocket_clip", "retrieval", 0.3, size=128)
    record = next(read_stored(tmp_path).of("retrieval"))
    drawn = np.random.default_rng(0).permuted(np.tile(np.arange(50), (20_000, 1)), axis=1)[:, :5]
    by_picture = (drawn < 5).any(axis=1).mean()  # captions 0 to 4 are the picture's own
    assert chance_of(record) == pytest.approx((by_picture + 5 / 10) / 2, abs=0.01)


def test_views_are_those_of_the_steps_that_were_taken(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, steps=6)
    (stage,) = config.stages
    each = sum(partition.batch for partition in stage.partitions.values())
    double = {name: replace(one, batch=2 * one.batch) for name, one in stage.partitions.items()}
    config = replace(config, stages=[stage, replace(stage, steps=4, partitions=double)])
    for step, views in ((2, 2 * each), (6, 6 * each), (9, 12 * each)):
        assert Checkpoint(tmp_path, step, {}, {}, config, {}).views_seen == views


def test_gflop_of_an_encoder_are_those_of_its_shape() -> None:
    torch.set_num_threads(1)
    weights = small_weights()
    cost = cost_of(EncoderTarget("small", weights), (64, 96))
    for size in (64, 96):
        expected = vit_gflop(weights.shape, size, weights.patch_size)
        assert cost["gflop"][str(size)] == pytest.approx(expected, rel=0.01)
        assert cost["gflop_with_adaptors"][str(size)] > cost["gflop"][str(size)]
    backbone = sum(value.numel() for value in weights.backbone.values())
    assert cost["parameters_m"] * 1e6 > 0.99 * backbone


# Measuring

SAID = {"subject": "pixels", "role": "floor", "order": 0, "target": "pixels"}


def test_what_is_stored_is_not_measured_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RADIO_CACHE", str(tmp_path / "cache"))
    for name in (TINY, COCO, PEOPLE):
        (tmp_path / "sets" / name).mkdir(parents=True)
        write_folder(tmp_path / "sets" / name, train=24, val=9)
    setting = Setting("pocket", {}, (0,), (1,))
    subjects = subjects_of(setting, "nowhere", None, [])
    out = tmp_path / "out"

    def run() -> None:
        Measurer(setting, str(tmp_path / "sets"), out).run(
            subjects, ["pixels", "constant", "student"]
        )

    run()
    stored = read_stored(out)
    assert {r.subject for r in stored.records} == {"pixels", "constant"}
    knn = stored.one("knn", "pixels", 64)
    assert knn is not None and knn.samples is not None
    assert knn.score == knn.samples.mean()
    assert knn.facts["command"].startswith("radio evaluate pixels --task knn --data")
    constant = stored.one("masks-box-coco", "constant")
    assert constant is not None and 0.9 < constant.score <= 1  # all masks are rectangles
    assert "unknown target 'nowhere'" in stored.missing["student"]
    before = {path: path.read_bytes() for path in out.glob("*/*")}

    def never(*_: Any) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr(measure_module, "measure", never)
    monkeypatch.setattr(measure_module, "constant_masks", never)
    run()
    assert {path: path.read_bytes() for path in out.glob("*/*")} == before
    (out / "pixels" / f"{Job(ROWS['knn'], 64).name}.json").unlink()
    with pytest.raises(AssertionError, match="measured again"):
        run()


def test_a_class_of_another_name_is_another_measurement(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RADIO_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "sets" / TINY
    folder.mkdir(parents=True)
    write_folder(folder, train=24, val=9)
    setting, out = Setting("pocket", {}, (0,), (1,)), tmp_path / "out"

    def key() -> str:
        measurer = Measurer(setting, str(tmp_path / "sets"), out)
        measurer._job(out, PixelsTarget(), Job(ROWS["knn"], 64), SAID)
        found: str = json.loads((out / "knn_64.json").read_text())["key"]
        return found

    first = key()
    assert key() == first
    classes = folder / "classes.txt"
    classes.write_text(classes.read_text().replace("green", "lime"))
    assert key() != first


def test_another_tokenizer_is_another_measurement(tmp_path: Path) -> None:
    target, job = resolve("pocket_clip"), Job(ROWS["retrieval"], 128)
    first = decoder_print(target, job)
    assert decoder_print(resolve("pocket_clip"), job) == first
    own = shutil.copytree(POCKET / "clip", tmp_path / "clip") / "tokenizer.json"
    told = Job(ROWS["retrieval"], 128, "", {"tokenizer": str(tmp_path / "clip")})
    assert decoder_print(target, told) == first  # the same files elsewhere
    own.write_text(own.read_text().replace('"lowercase": true', '"lowercase": false'))
    assert decoder_print(target, told) != first


def test_other_weights_of_a_text_tower_are_another_measurement() -> None:
    class Towered(PixelsTarget):
        def text_tower(self, adaptor: str | None = None, tokenizer: str | None = None) -> Any:
            assert adaptor == "clip"
            return torch.nn.Linear(2, 2)

    target, job = Towered(), Job(ROWS["retrieval"], 128, "clip")
    prints = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        prints.append(decoder_print(target, job))
    assert prints[0] == prints[1] != prints[2]
    assert decoder_print(target, Job(ROWS["knn"], 128)) is None
    with pytest.raises(RadioError, match="mask decoder"):
        decoder_print(target, Job(ROWS["masks-box-coco"], 256))


# The page


def store(
    out: Path,
    subject: str,
    row: str,
    score: float,
    size: int | None = None,
    tag: str = "",
    samples: np.ndarray | None = None,
    details: dict[str, Any] | None = None,
    fingerprint: str | None = None,
) -> None:
    roles = {s.label: s.role for s in SUBJECTS}
    told: dict[str, Any] = {"chance": 0.05, "pictures": 10, "captions": 50, **(details or {})}
    told["rows"] = [
        {"direction": d, "k": 5, "recall": score + shift, "interval": [score, score + shift]}
        for d, shift in (("image_to_text", 0.1), ("text_to_image", -0.1))
    ]
    interval = (score - 0.02, score + 0.02)
    if samples is not None:
        interval = bootstrap(samples, statistic_of(row))
    facts = {
        "subject": subject,
        "role": roles[subject],
        "order": list(roles).index(subject),
        "row": row,
        "tag": tag,
        "size": size,
        "fingerprint": fingerprint or subject,
        "views_seen": 1234,
        "seconds": 60,
        "commit": "abc123",
        "versions": {"torch": "2"},
    }
    result = Result(ROWS[row].task, subject, score, interval, told, samples)
    write_record(out / subject, Job(ROWS[row], size, tag).name, facts, result)


def hits(share: float, count: int = 100) -> np.ndarray:
    return (np.arange(count) < share * count).astype(float)


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Results as they would be: siglip the best at kNN, the student half as good."""
    folder = tmp_path_factory.mktemp("results") / "quality"
    for subject, size, share in (
        ("pixels", 64, 0.1),
        ("pocket_clip", 128, 0.5),
        ("pocket_siglip", 160, 0.7),
        ("pocket_dinov2", 128, 0.3),
        ("student", 128, 0.34),
        ("student", 160, 0.34),
        ("control", 160, 0.12),
        ("step-000010", 128, 0.2),
    ):
        store(folder, subject, "knn", share, size, samples=hits(share))
    store(folder, "student", "knn", 0.4, 160, "siglip", hits(0.4))
    store(folder, "pocket_clip", "zero-shot-seen", 0.6, 128, samples=hits(0.6))
    store(folder, "pocket_clip", "retrieval", 0.35, 128)
    masks = {
        "constant": (None, "", 0.5),
        "pocket_sam": (256, "", 0.7),
        "student": (256, "sam", 0.6),
    }
    for subject, (size, tag, score) in masks.items():
        rows = np.stack([np.full(20, score), np.ones(20)], axis=1)
        store(folder, subject, "masks-point-coco", score, size, tag, rows)
    curves = {"sam": {"min_over_max": 0.8, "max": 0.05, "interval": [0.7, 0.9]}}
    store(folder, "student", "mode-switch-coco", 0.8, details={"teachers": curves})
    (folder / "missing.json").write_text(json.dumps({"student/camvid_128": "no such\nmap"}))
    return folder


def of(found: Sequence[Verdict], what: str) -> Verdict:
    (verdict,) = (v for v in found if what in v.what)
    return verdict


def test_the_share_that_counts_is_of_the_best_teacher_at_any_size(out: Path) -> None:
    kept = {one.size: one for one in kept_of(read_stored(out), "knn")}
    assert {size: one.teacher.subject for size, one in kept.items()} == {
        128: "pocket_clip",
        160: "pocket_siglip",
    }
    assert [kept[size].is_best for size in (128, 160)] == [False, True]
    assert kept[128].retention.share == pytest.approx(0.24 / 0.4)
    assert kept[160].retention.share == pytest.approx(0.24 / 0.6)
    assert kept[160].student.tag == ""


def test_verdicts_are_computed_from_the_figures(out: Path) -> None:
    found = verdicts(read_stored(out), "pocket")
    assert of(found, "pocket_clip: zero-shot, 80").holds is True
    assert of(found, "pocket_clip: zero-shot, 20").holds is None
    assert of(found, "pocket_clip: Flickr8k recall@5, image to text").holds is True
    assert of(found, "pocket_clip: Flickr8k recall@5, text to image").holds is False
    assert of(found, "kNN over pixels").what.endswith("from the trunk")  # as training.json says
    assert of(found, "kNN over pixels").holds is False  # 3 times pixels; from scratch 2.5 would do
    assert of(verdicts(read_stored(out), "demo"), "kNN over pixels").what.endswith("from scratch")
    point = of(found, "pocket_sam: masks by point, coco")
    assert point.holds is True and "+0.200 [0.200, 0.200]" in point.found
    assert of(found, "keeps of kNN").holds is False and "0.400" in of(found, "keeps of kNN").found
    assert of(found, "keeps of masks by point, coco").holds is False  # 0.5 of 0.7
    assert of(found, "below ours: kNN").holds is True
    assert of(found, "mode switch, coco: sam").holds is False  # max e below 0.1
    assert of(found, "keeps of segmentation, CamVid").found == "not measured"


def test_a_lead_whose_interval_holds_0_does_not_count(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for subject, size, shift in (("constant", None, 0.0), ("pocket_sam", 256, 0.2)):
        noisy = np.stack([rng.normal(0.5, 2, 30) + shift, np.ones(30)], axis=1)
        store(tmp_path, subject, "masks-point-coco", 0.5 + shift, size, samples=noisy)
    stored = read_stored(tmp_path)
    first, second = (stored.one("masks-point-coco", s) for s in ("pocket_sam", "constant"))
    assert first is not None and second is not None
    gain, interval = difference(first, second)
    assert gain == pytest.approx(0.2) and interval is not None and interval[0] < 0 < interval[1]
    assert of(verdicts(stored, "pocket"), "pocket_sam: masks by point, coco").holds is False


def test_a_share_of_a_lead_that_is_not_resolved_is_no_answer(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    noise = rng.normal(0.5, 2, 30)
    for subject, size, tag, shift in (
        ("constant", None, "", 0.0),
        ("pocket_sam", 256, "", 0.2),
        ("student", 256, "sam", 0.19),
    ):
        values = np.stack([rng.permutation(noise) + shift, np.ones(30)], axis=1)
        store(tmp_path, subject, "masks-point-coco", 0.5 + shift, size, tag, values)
    found = of(verdicts(read_stored(tmp_path), "pocket"), "keeps of masks by point, coco")
    assert found.holds is None  # though 0.95 is above the 0.7 that are asked
    assert found.found.startswith("0.950 of pocket_sam's") and "not resolved" in found.found
    (tmp_path / "student" / "masks-point-coco_sam_256.npz").unlink()
    found = of(verdicts(read_stored(tmp_path), "pocket"), "keeps of masks by point, coco")
    assert found.holds is True  # there is nothing to resample


def test_the_commands_that_the_page_gives_are_what_the_programs_take() -> None:
    lines = COMMANDS.replace("\\\n", " ").splitlines()
    commands = [shlex.split(line) for line in lines]
    trainings = [load_config(words[2:]) for words in commands if words[:2] == ["radio", "train"]]
    student, control = trainings
    assert all(teacher.pretrained is None for teacher in control.teachers.values())
    assert control.out == "runs/control" and student.out == "runs/pocket"
    control = replace(control, out=student.out, cache=student.cache, teachers=student.teachers)
    assert control == student and student.stages[0].steps == 4000 and student.codec == "int8"
    told = subprocess.run(
        [commands[-1][0], "--no-print-directory", "--dry-run", "--always-make", *commands[-1][1:]],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    made = shlex.split(told.splitlines()[-1])[1:]
    (said,) = (part for part in HOW.replace("\n", " ").split("`") if part.startswith("python -m"))
    given = arguments(made[2:])
    assert made == [*shlex.split(said)[1:], *given.subjects]
    known = subjects_of(
        SETTING, given.student, given.control, [f"it/step-{n:06}" for n in range(400, 4001, 400)]
    )
    unknown = set(given.subjects) - {subject.label for subject in known}
    assert given.subjects and not unknown
    assert (given.student, given.control, given.curve) == (
        "pocket",
        "runs/control",
        Path("runs/pocket"),
    )


def test_the_page_shows_what_there_is_and_names_what_is_not(out: Path, tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    words = ["--out", str(out), "--page", str(tmp_path / "docs" / "results.md"), "--page-only"]
    main(words)
    text = (tmp_path / "docs" / "results.md").read_text()
    assert f"({os.path.relpath(out, tmp_path / 'docs')})" in text
    lines = text.splitlines()
    (knn,) = (line for line in lines if line.startswith("| kNN, 100 classes | 160 | 0.100 ["))
    cells = [cell.strip() for cell in knn.strip("|").split("|")]
    assert cells[3] == "–" and cells[4].startswith("0.700 [0.6")
    assert cells[7].startswith("0.340 [") and "<br>siglip 0.400 [" in cells[7]
    assert cells[8].startswith("0.120 [")
    assert "**0.40 [" in next(line for line in lines if "pocket_siglip 0.700" in line)
    assert any(line.startswith("| step-000010 | 1,234 | 0.200, kept 0.25") for line in lines)
    assert "- `student/camvid_128`: no such map" in lines
    assert "lines hold" in text and "| **no** |" in text and "abc123" in text
    widths: set[int] = set()
    for line in [*lines, ""]:  # a table's lines have as many cells as its head
        widths = widths | {line.count("|")} if line.startswith("|") else set()
        assert len(widths) < 2, line


def test_an_empty_folder_makes_a_page_that_says_so(tmp_path: Path) -> None:
    text = "\n".join(page(Stored([], {}, {}), "pocket", "out", "../out"))
    for subject in ("pixels", "pocket_clip", "pocket_sam", "student"):
        assert f"- `{subject}`: not yet" in text
    assert "0 of " in text


def test_results_of_two_sets_of_weights_are_refused(out: Path, tmp_path: Path) -> None:
    mixed = shutil.copytree(out, tmp_path / "mixed")
    store(mixed, "student", "rank", 9.0, 128, fingerprint="another")
    with pytest.raises(RadioError, match=r"'student' .*different weights.*delete"):
        read_stored(mixed)


def test_unknown_subjects_and_runs_without_checkpoints_are_named(tmp_path: Path) -> None:
    folder = tmp_path / TINY
    folder.mkdir()
    write_folder(folder, train=3, val=3)
    words = ["--data", str(tmp_path), "--out", str(tmp_path / "out")]
    with pytest.raises(RadioError, match=r"unknown subject 'luck'; known: pixels, constant, poc"):
        main([*words, "luck"])
    with pytest.raises(RadioError, match=r"no checkpoints/step-\*"):
        main([*words, "--curve", str(tmp_path)])
