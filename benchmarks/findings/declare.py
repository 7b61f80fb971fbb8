"""What a finding declares, and nothing that runs: claim, arms, measure, comparisons, page."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from benchmarks.findings.measures import Scores
    from benchmarks.findings.trained import Trained

HIGHER, LOWER = "higher", "lower"
LOW, HIGH = 128, 256  # px a side of the student's pictures
TEACHERS = ("clip", "siglip", "dinov2", "sam")
STUDENT = "student"  # the arm of a finding that is about one student
RANK = "mean rank"  # over the metrics that a finding ranks its arms by


@dataclass(frozen=True)
class Arm:
    """One way to train: Hydra overrides of configs/experiment/finding.yaml.

    `deviations` are what each teacher's features are scaled to before anything else (None: as
    they are). Arms that say the same share a run, also over findings.
    """

    name: str
    overrides: tuple[str, ...] = ()
    deviations: Mapping[str, float] | None = None


@dataclass(frozen=True)
class Side:
    """A metric of an arm."""

    arm: str
    metric: str

    def __str__(self) -> str:
        return f"{self.arm}: {self.metric}"


@dataclass(frozen=True)
class Comparison:
    """What is set against what, and whether the paper has the first higher or lower (None: open).

    Both sides are of the same seed, and of the same pictures where there are samples.
    """

    first: Side
    second: Side
    paper: str | None


@dataclass(frozen=True)
class Finding:
    """A claim of a paper, and all that is needed to look at it again.

    `claim` holds the paper's own figures; `how` says what is measured here. Metrics of the page are
    named by fnmatch patterns: `tables` by title; `ranked`, the higher the better, over which arms
    but the `unranked` get a mean rank; and one figure of what `label` says: `points`, or `lines`
    over the number behind a metric's @, which is what `across` says.
    """

    title: str
    claim: str
    how: str
    measure: Callable[[Trained], Scores]
    comparisons: tuple[Comparison, ...]
    tables: Mapping[str, Sequence[str]]
    label: str
    points: Sequence[str] = ()
    lines: Sequence[str] = ()
    across: str = ""
    arms: tuple[Arm, ...] = (Arm(STUDENT),)
    ranked: Sequence[str] = ()
    unranked: Sequence[str] = ()


def against(
    first: str, second: str, metrics: Sequence[str], paper: str | None
) -> tuple[Comparison, ...]:
    """Compare two arms by several metrics, of which the paper says the same."""
    return tuple(Comparison(Side(first, m), Side(second, m), paper) for m in metrics)


def within(first: str, second: str, paper: str | None) -> Comparison:
    """Compare two metrics of the only arm."""
    return Comparison(Side(STUDENT, first), Side(STUDENT, second), paper)


def stages(partitions: Mapping[str, tuple[int, int, Sequence[str]]]) -> str:
    """Return the override that gives a run these partitions: (image_size, batch, teachers) by name.

    Views are shown as finding.yaml shows them.
    """

    def mode(name: str, size: int) -> str:
        return {"dinov2": "match", "sam": "mosaic" if size == LOW else "native"}.get(name, "native")

    shown = [
        f"{name}: {{image_size: {size}, batch: {batch}, views: "
        f"{{{', '.join(f'{teacher}: {mode(teacher, size)}' for teacher in teachers)}}}}}"
        for name, (size, batch, teachers) in partitions.items()
    ]
    return f"stages=[{{steps: 1, partitions: {{{', '.join(shown)}}}}}]"
