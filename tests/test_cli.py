"""The command line as a user meets it: real processes, their exit codes and words."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from test_distill import losses_of, rows_of
from tiny import tiny_config, write_pictures

from radio.cli import main
from radio.files import sha256_of
from radio.targets.fit import fit
from radio.targets.stream import LocalStream
from radio.targets.target_maker import StandardizerFile
from radio.training.distill import distill

ROOT = Path(__file__).parents[1]
Radio = Callable[..., subprocess.CompletedProcess[str]]


def radio(*words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", "from radio.cli import main; main()", *words],
        capture_output=True,
        text=True,
        cwd=cwd,
        timeout=300,
        check=False,
    )


@pytest.fixture
def radio_here(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Radio:
    """`radio` in this process, which has imported everything: each start takes seconds."""

    def run(*words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
        monkeypatch.chdir(cwd)
        monkeypatch.setattr(sys, "argv", ["radio", *words])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            main()
        code = stopped.value.code or 0
        assert isinstance(code, int)
        return subprocess.CompletedProcess(words, code, *capsys.readouterr())

    return run


def test_help_teaches_every_verb(tmp_path: Path) -> None:
    done = radio("--help", cwd=tmp_path)
    assert done.returncode == 0
    for verb in ("demo", "train", "fit", "fuse", "encode", "evaluate", "teachers", "doctor"):
        assert verb in done.stdout


def test_help_and_teachers_import_neither_torch_nor_ray(tmp_path: Path) -> None:
    program = (
        "import sys, radio.cli, radio.config\n"
        "radio.cli.teachers(json_file=None)\n"
        "assert not {'torch', 'ray', 'timm'} & set(sys.modules), 'heavy imports'\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert "demo_clip" in done.stdout.replace("\n", "") or "clip" in done.stdout


def test_teachers_as_json_has_every_card(tmp_path: Path) -> None:
    listed = json.loads(radio("teachers", "--json", "-", cwd=tmp_path).stdout)
    names = {path.stem for path in (ROOT / "configs" / "teacher").glob("*.yaml")}
    assert set(listed) == names
    assert listed["sam_h"]["card"]["summary_dim"] is None


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["train", "experiment=dmeo"], "dmeo"),
        (["train", "experiment=demo", "data.train=nowhere"], "data.train: nowhere"),
        (["train", "experiment=demo", "data.train=empty"], "empty"),
        (["train", "experiment=demo", "optimizer.lrr=1"], "lrr"),
        (["evaluate", "nowhere"], "nowhere"),
        (["evaluate", "nowhere", "--task", "luck"], "fidelity"),
        (["fuse", "nowhere", "out"], "nowhere"),
        (["encode", "empty", "-o", "out", "-m", "nowhere"], "nowhere"),
    ],
)
def test_mistakes_exit_with_2_and_no_traceback(
    words: list[str], said: str, tmp_path: Path, radio_here: Radio
) -> None:
    (tmp_path / "empty").mkdir()
    done = radio_here(*words, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and said in done.stderr


def test_a_mistake_in_a_process_of_its_own(tmp_path: Path) -> None:
    done = radio("fuse", "nowhere", "out", cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr and "nowhere" in done.stderr


def test_a_dry_run_prints_config_and_plan_and_runs_nothing(
    tmp_path: Path, radio_here: Radio
) -> None:
    write_pictures(tmp_path / "photos", 24)
    done = radio_here(
        "train", "--dry-run", "experiment=demo", "data.train=photos", "data.val=null", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert "24 train" in done.stdout and "partition low: 8 views at 128 px" in done.stdout
    assert not (tmp_path / "runs").exists()


def test_doctor_names_what_it_looked_at(tmp_path: Path) -> None:
    findings = json.loads(radio("doctor", "--json", "-", cwd=tmp_path).stdout)
    assert {"python", "torch", "ray", "memory", "disk here"} <= {f["what"] for f in findings}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return distill(tiny_config(tmp_path_factory.mktemp("undisturbed"), steps=20)).out


@pytest.mark.parametrize(
    "number",
    [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow), signal.SIGKILL],
)
def test_a_stopped_process_resumes_with_the_same_bits(
    number: signal.Signals, undisturbed: Path, tmp_path: Path
) -> None:
    """SIGINT and SIGTERM end after a whole step, saved; SIGKILL falls back to a checkpoint."""
    config = tiny_config(tmp_path, steps=20)
    program = (
        "import sys, pathlib; sys.path.insert(0, sys.argv[2])\n"
        "from radio.cli import main\n"
        "from radio import config as c\n"
        "from tiny import tiny_config\n"
        "config = tiny_config(pathlib.Path(sys.argv[1]), steps=20)\n"
        "c.load = lambda overrides: config\n"
        "sys.argv = ['radio', 'train']\n"
        "main()\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path), str(ROOT / "tests")]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    metrics = Path(config.out) / "metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and '"step": 3,' in metrics.read_text()):
        time.sleep(0.02)
    process.send_signal(number)
    _, said = process.communicate(timeout=120)
    assert process.returncode == (-9 if number == signal.SIGKILL else 130), said
    distill(config)
    assert losses_of(config.out) == losses_of(undisturbed)
    if number != signal.SIGKILL:
        assert "the same command resumes" in " ".join(said.split())


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, beside its pictures."""
    return distill(tiny_config(tmp_path_factory.mktemp("trained"), steps=2)).out


def test_a_run_is_fused_and_encodes_pictures(
    trained: Path, tmp_path: Path, radio_here: Radio
) -> None:
    done = radio_here("fuse", str(trained), "encoder", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, "encoder\n"), done.stderr
    photos = write_pictures(tmp_path / "photos", 3)
    (photos / "p001.png").write_bytes((photos / "p001.png").read_bytes()[:200])
    words = (
        "encode",
        "photos",
        "-o",
        "out",
        "-m",
        "encoder",
        "--features",
        "summary,parts:summary",
    )
    done = radio(*words, cwd=tmp_path)
    assert done.returncode == 3, "some failed"
    assert "2 pictures encoded, 1 failed" in done.stdout
    assert "photos/p001.png failed" in done.stderr
    rows = pq.read_table(tmp_path / "out" / "data" / "00000.parquet").to_pylist()
    assert [row["status"] for row in rows] == ["ok", "failed", "ok"]
    assert len(rows[0]["parts:summary"]) == 6 and rows[1]["parts:summary"] is None
    assert radio_here(*words, "--overwrite", cwd=tmp_path).returncode == 3


def test_evaluate_measures_what_the_run_did(
    trained: Path, tmp_path: Path, radio_here: Radio
) -> None:
    files = ("--json", "found.json", "--figure", "found.svg")
    done = radio_here("evaluate", str(trained), *files, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "95 % interval" in done.stdout and "<svg" in (tmp_path / "found.svg").read_text()
    result = json.loads((tmp_path / "found.json").read_text())
    (after,) = [record for record in rows_of(trained) if record["step"] == 2]
    assert result["details"]["rows"] == after["held_out"]
    assert result["score"] == min(r["fidelity"] for r in after["held_out"] if not r["merged"])


def test_fit_writes_the_files_that_a_run_then_uses(trained: Path, tmp_path: Path) -> None:
    config = tiny_config(tmp_path, steps=2)
    with LocalStream(config) as stream:
        seen: list[tuple[int, int]] = []
        files = fit(config, stream, lambda done, total: seen.append((done, total)))
    assert seen == [(1, 3), (2, 3), (3, 3)]
    for name, file in files.items():
        assert file == StandardizerFile.of(Path(file.path))
        assert sha256_of(trained / "standardizers" / f"{name}.safetensors") == file.sha256


def test_the_readme_test_command_is_what_ci_runs() -> None:
    assert "make test" in (ROOT / ".ci" / "run").read_text()
    assert "make test" in (ROOT / "README.md").read_text()
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
