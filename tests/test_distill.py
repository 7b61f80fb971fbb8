from __future__ import annotations

import errno
import json
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import tiny_config

from radio.config import Config
from radio.data.plan import StepSpec
from radio.errors import RadioError
from radio.targets.stream import LocalStream, StepBatch
from radio.targets.target_maker import Request
from radio.training import checkpoint as checkpoint_module
from radio.training.checkpoint import load_checkpoint, newest_checkpoint
from radio.training.distill import distill
from teachers import TeacherOutput

pytestmark = pytest.mark.usefixtures("no_report")


class Killed(BaseException):
    """Stands for a process that dies."""


class DyingStream(LocalStream):
    """A LocalStream whose process dies when a training step is about to be handed out."""

    def __init__(self, config: Config, at: int) -> None:
        super().__init__(config)
        self.at = at

    def read(
        self, specs: Iterable[StepSpec], request: Request, incarnation: int = 0
    ) -> Iterator[StepBatch]:
        for batch in super().read(specs, request, incarnation):
            if request.codec != "float32" and batch.step == self.at:
                raise Killed
            yield batch


def losses_of(out: str | Path) -> list[dict[str, float]]:
    lines = (Path(out) / "metrics.jsonl").read_text().splitlines()
    return [record["losses"] for line in lines if "losses" in (record := json.loads(line))]


def rows_of(out: str | Path) -> list[dict[str, object]]:
    lines = (Path(out) / "metrics.jsonl").read_text().splitlines()
    return [record for line in lines if "held_out" in (record := json.loads(line))]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = tiny_config(tmp_path_factory.mktemp("undisturbed"))
    return distill(config).out


def test_a_run_learns_and_leaves_its_folder(undisturbed: Path) -> None:
    names = {path.name for path in undisturbed.iterdir()}
    assert {"config.yaml", "metrics.jsonl", "checkpoints", "standardizers", "report.html"} <= names
    losses = losses_of(undisturbed)
    assert len(losses) == 6
    assert set(losses[0]) == {
        "words/summary", "words/features", "parts/summary", "parts/features", "edges/features",
    }  # fmt: skip
    assert sum(losses[-1].values()) < sum(losses[0].values())
    assert [path.name for path in sorted((undisturbed / "checkpoints").iterdir())] == [
        "step-000002", "step-000004", "step-000006",
    ]  # fmt: skip
    before, after = rows_of(undisturbed)
    assert (before["step"], after["step"]) == (0, 6)
    sizes = [(row["teacher"], row["image_size"], row["merged"]) for row in after["held_out"]]
    assert len(sizes) == 3 * 3 and ("edges", 64, True) in sizes


@pytest.mark.parametrize("at", range(6))
def test_killed_at_any_step_and_resumed_gives_the_same_bits(
    at: int, undisturbed: Path, tmp_path: Path
) -> None:
    config = tiny_config(tmp_path)
    same_data(config, undisturbed)
    with pytest.raises(Killed):
        distill(config, DyingStream(config, at))
    distill(config)
    assert losses_of(config.out) == losses_of(undisturbed)
    assert rows_of(config.out) == rows_of(undisturbed)
    ours = load_checkpoint(Path(config.out) / "checkpoints" / "step-000006").model
    theirs = load_checkpoint(undisturbed / "checkpoints" / "step-000006").model
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def same_data(config: Config, undisturbed: Path) -> None:
    config.data.train = str(undisturbed.parent / "train")
    config.data.val = str(undisturbed.parent / "val")


def test_a_finished_run_says_so_and_trains_nothing(
    undisturbed: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = replace(tiny_config(undisturbed.parent), out=str(undisturbed))
    with caplog.at_level("INFO"):
        result = distill(config)
    assert result.step == 6 and result.after
    assert "finished" in caplog.text
    assert len(losses_of(undisturbed)) == 6


def test_teachers_on_a_cluster_are_not_built_here_instead(tmp_path: Path) -> None:
    config = replace(tiny_config(tmp_path), stream="ray")
    with pytest.raises(RadioError, match=r"ray_jobs\.train\.train\(config\).*stream=local"):
        distill(config)


def test_another_configuration_is_refused_by_key(undisturbed: Path) -> None:
    config = replace(tiny_config(undisturbed.parent), out=str(undisturbed))
    config.optimizer.lr = 0.5
    with pytest.raises(RadioError, match=r"optimizer\.lr: 0\.001 -> 0\.5"):
        distill(config)


def test_other_pictures_are_refused(undisturbed: Path, tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    same_data(config, undisturbed)
    with pytest.raises(Killed):
        distill(config, DyingStream(config, 4))
    victim = tmp_path / "train2"
    (tmp_path / "train").rename(victim)
    next(iter(sorted(victim.iterdir()))).unlink()
    config.data.train = str(victim)
    with pytest.raises(RadioError, match=r"data\.train"):
        distill(config)


def test_a_changed_teacher_is_refused_by_name(undisturbed: Path, tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    with pytest.raises(Killed):
        distill(config, DyingStream(config, 4))
    with LocalStream(config) as stream:
        parts = stream.makers["parts"]
        with torch.no_grad():
            next(parts.teacher.parameters()).add_(1.0)
        changed = replace(stream.teachers["parts"], fingerprint="another")
        stream._facts["parts"] = changed
        with pytest.raises(RadioError, match="'parts'"):
            distill(config, stream)


def test_a_nan_names_its_teacher_and_its_picture(tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    with LocalStream(config) as stream:
        maker = stream.makers["words"]
        forward = maker.teacher.forward

        def broken(pixels: torch.Tensor) -> TeacherOutput:
            output = forward(pixels)
            output.features[0] = float("nan")
            return output

        maker.teacher.forward = broken  # type: ignore[method-assign]
        with pytest.raises(RadioError, match=r"teacher 'words' returned NaN.*features for p\d+"):
            distill(config, stream)


def test_a_nan_loss_names_its_teacher_and_saves_nothing(tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    config.optimizer = replace(config.optimizer, lr=1e30, clip_norm=None)
    with pytest.raises(RadioError, match=r"the loss (words|parts|edges)/.* is (nan|inf)"):
        distill(config)
    newest = newest_checkpoint(Path(config.out) / "checkpoints")
    if newest is not None:
        tensors = load_checkpoint(newest).model.values()
        assert all(torch.isfinite(tensor).all() for tensor in tensors)


def test_a_full_disk_keeps_the_earlier_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(tmp_path)
    write = checkpoint_module.save_tensors

    def full(tensors: dict[str, torch.Tensor], path: Path) -> None:
        if "step-000004" in str(path) and path.name == "optimizer.safetensors":
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        write(tensors, path)

    monkeypatch.setattr(checkpoint_module, "save_tensors", full)
    with pytest.raises(RadioError, match=r"disk full.*step-000002 is whole"):
        distill(config)
    kept = [path.name for path in (Path(config.out) / "checkpoints").iterdir()]
    assert kept == ["step-000002"]
    monkeypatch.undo()
    assert distill(config).step == 6


def test_a_damaged_checkpoint_is_named(undisturbed: Path, tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    with pytest.raises(Killed):
        distill(config, DyingStream(config, 5))
    model = Path(config.out) / "checkpoints" / "step-000004" / "model.safetensors"
    data = bytearray(model.read_bytes())
    data[-1] ^= 1
    model.write_bytes(data)
    with pytest.raises(RadioError, match=r"step-000004.model\.safetensors is missing or damaged"):
        distill(config)


def test_two_processes_cannot_hold_one_folder(tmp_path: Path) -> None:
    from filelock import FileLock

    config = tiny_config(tmp_path)
    Path(config.out).mkdir(parents=True)
    with FileLock(Path(config.out) / ".lock"), pytest.raises(RadioError, match="another process"):
        distill(config)


def test_a_damaged_picture_is_replaced_counted_and_named(tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    victim = sorted((tmp_path / "train").iterdir())[3]
    victim.write_bytes(victim.read_bytes()[: victim.stat().st_size // 2])
    result = distill(config)
    assert list(result.damaged) == ["p003"]
    assert all(
        torch.isfinite(torch.tensor(list(losses.values()))).all()
        for losses in losses_of(config.out)
    )


def test_too_many_damaged_pictures_stop_the_run(tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    config.data.max_damaged = 0.001
    for victim in sorted((tmp_path / "train").iterdir())[:8]:
        victim.write_bytes(victim.read_bytes()[:60])
    with pytest.raises(RadioError, match=r"damaged views.*max_damaged"):
        distill(config)


def test_another_number_of_threads_is_said_and_allowed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = tiny_config(tmp_path)
    with pytest.raises(Killed):
        distill(config, DyingStream(config, 3))
    config.threads.student = 1
    with caplog.at_level("WARNING"):
        assert distill(config).step == 6
    assert "threads" in caplog.text


def test_a_mosaic_that_does_not_fit_names_partition_and_teacher(tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    config.stages[0].partitions["low"].image_size = 80  # its canvas has 64 px
    with pytest.raises(RadioError, match=r"'low'.*'edges'.*nearest that do: 64"):
        distill(config)


def test_looking_in_mid_run_changes_no_bit(undisturbed: Path, tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    config.evaluation.every_steps = 2
    distill(config)
    assert losses_of(config.out) == losses_of(undisturbed)
    assert [record["step"] for record in rows_of(config.out)] == [0, 2, 4, 6]
