"""What a finding declares, and nothing that runs: arms, measure, comparisons, tables, figure."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from benchmarks.findings.samples import Samples
    from benchmarks.findings.trained import Trained

HIGHER, LOWER = "higher", "lower"
LOW, HIGH = 128, 256  # px a side of the student's pictures
TEACHERS = ("clip", "siglip", "dinov2", "sam")
MODES = {"clip": "native", "siglip": "native", "dinov2": "match", "sam": "native"}


@dataclass(frozen=True)
class Measured:
    """What one arm gives with one seed: plain scores, and those that pictures stand behind."""

    scores: Mapping[str, float] = field(default_factory=dict)
    samples: Mapping[str, Samples] = field(default_factory=dict)


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
    paper: str | None = None


@dataclass(frozen=True)
class Table:
    """Columns of a table whose rows are the arms: metrics by fnmatch patterns."""

    title: str
    patterns: tuple[str, ...]


@dataclass(frozen=True)
class Figure:
    """Bars of each metric, or lines over the px behind its @; metrics by fnmatch patterns."""

    kind: str  # bars, lines
    label: str
    patterns: tuple[str, ...]


@dataclass(frozen=True)
class Finding:
    """A claim of a paper, and all that is needed to look at it again.

    `claim` holds the paper's own figures; `how` says what is measured here. `ranked` are metrics,
    the higher the better, over which arms get a mean rank.
    """

    title: str
    claim: str
    how: str
    arms: tuple[Arm, ...]
    measure: Callable[[Trained], Measured]
    comparisons: tuple[Comparison, ...]
    tables: tuple[Table, ...]
    figure: Figure
    ranked: tuple[str, ...] = ()


def against(
    first: str, second: str, metrics: Sequence[str], paper: str | None
) -> tuple[Comparison, ...]:
    """Compare two arms by several metrics, of which the paper says the same."""
    return tuple(Comparison(Side(first, m), Side(second, m), paper) for m in metrics)


def of_teachers(
    kind: str, teachers: Sequence[str] = TEACHERS, sizes: Sequence[int] = (LOW, HIGH)
) -> tuple[str, ...]:
    """Return the metrics `kind/teacher@size`."""
    return tuple(f"{kind}/{name}@{size}" for name in teachers for size in sizes)


def stages(partitions: Mapping[str, tuple[int, int, Mapping[str, str]]]) -> str:
    """Return the override that gives a run these partitions: (image_size, batch, views) by name."""
    shown = ", ".join(
        f"{name}: {{image_size: {size}, batch: {batch}, views: {{"
        + ", ".join(f"{teacher}: {mode}" for teacher, mode in views.items())
        + "}}"
        for name, (size, batch, views) in partitions.items()
    )
    return f"stages=[{{steps: 1, partitions: {{{shown}}}}}]"
