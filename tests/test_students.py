"""Several students from one teacher pass: each is bit for bit what it is alone."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_distill import DyingStream, Killed, losses_of, rows_of
from test_stages import two_stages

from radio.checks import check
from radio.config import Config
from radio.data.plan import StepSpec
from radio.errors import RadioError
from radio.targets.stream import Coded, LocalStream
from radio.targets.target_maker import Request
from radio.training.checkpoint import find_checkpoint
from radio.training.distill import distill, students_of

pytestmark = pytest.mark.usefixtures("no_report")


class CountingStream(LocalStream):
    """A LocalStream that knows which steps its teachers were asked for."""

    steps: list[int]

    def encode(
        self, specs: Iterable[StepSpec], request: Request, incarnation: int = 0
    ) -> Iterator[tuple[StepSpec, Coded]]:
        self.steps = getattr(self, "steps", [])
        for spec, coded in super().encode(specs, request, incarnation):
            if request.codec != "float32":
                self.steps.append(spec.step)
            yield spec, coded


def three_students(root: Path) -> Config:
    """Return a run of two stages with a refit, and students that draw random numbers."""
    config = two_stages(root)
    config.checkpoint.every_steps = 1
    student = config.student
    config.students = {
        "shallow": replace(student, adaptor_depth=3, drop_path=0.3),
        "merging": replace(student, merge_per_block=1, damp=0.1),
    }
    check(config)
    return config


def assert_same_run(one: Path, other: Path) -> None:
    assert losses_of(one) == losses_of(other) and rows_of(one) == rows_of(other)
    a, b = (find_checkpoint(out).tensors["model"] for out in (one, other))
    assert all(torch.equal(a[key], b[key]) for key in a.keys() | b.keys())


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> Config:
    config = three_students(tmp_path_factory.mktemp("together"))
    with CountingStream(config) as stream:
        result = distill(config, stream)
        assert stream.steps == list(range(len(losses_of(config.out))))
    assert set(result.students) == {"shallow", "merging"}
    assert result.students["merging"].out == Path(config.out) / "students" / "merging"
    return config


@pytest.mark.parametrize("name", ["", "shallow", "merging"])
def test_each_student_is_bit_equal_to_its_run_alone(
    name: str, together: Config, tmp_path: Path
) -> None:
    shared = students_of(together)[name]
    alone = replace(shared, out=str(tmp_path / "alone"))
    assert distill(alone).students == {}
    assert_same_run(Path(shared.out), Path(alone.out))


def test_students_killed_between_their_checkpoints_resume_exactly(
    together: Config, tmp_path: Path
) -> None:
    """The one that is ahead waits for the one that is behind."""
    config = replace(together, out=str(tmp_path / "run"))
    with pytest.raises(Killed), DyingStream(config, at=3) as stream:
        distill(config, stream)
    behind = Path(config.out) / "students" / "shallow" / "checkpoints"
    newest = max(behind.iterdir())
    newest.rename(tmp_path / "lost")
    assert len(list(behind.iterdir())) >= 1
    distill(config)
    for name, run in students_of(config).items():
        assert_same_run(Path(students_of(together)[name].out), Path(run.out))


def test_students_of_another_grid_are_refused(together: Config) -> None:
    config = replace(together, students={"fine": replace(together.student, patch_size=8)})
    with pytest.raises(RadioError, match=r"students\.fine\.patch_size is 8.*one grid"):
        check(config)
    config = replace(together, students={"a/b": together.student})
    with pytest.raises(RadioError, match="becomes a folder"):
        check(config)
