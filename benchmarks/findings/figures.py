"""One figure per finding: bars with a dot for each seed, or lines over the number behind the @."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from benchmarks.findings.compare import arms_of, metrics_of, values_of
from benchmarks.findings.declare import Finding
from benchmarks.findings.records import Record
from radio.evaluation.figures import STYLE

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WIDTH, BAR, PANEL = 7.2, 0.16, 2.8  # inches: width, of a bar's height, of a panel of lines


def save(finding: Finding, records: Sequence[Record], path: Path) -> None:
    """Draw a finding's figure as SVG, the same bytes for the same records."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({**STYLE, "font.size": 8, "svg.hashsalt": path.stem}):
        figure = Figure(layout="constrained")
        (_bars if finding.bars else _lines)(figure, finding, records)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, metadata={"Date": None, "Creator": None})


def _bars(figure: Figure, finding: Finding, records: Sequence[Record]) -> None:
    """A group of bars per metric, a bar per arm."""
    arms, metrics = arms_of(records), metrics_of(finding.bars, records)
    pitch = len(arms) + 1
    figure.set_size_inches(WIDTH, 0.7 + BAR * len(metrics) * pitch)
    axes = figure.add_subplot()
    for at, arm in enumerate(arms):
        seeds = [list(values_of(records, arm, metric).values()) for metric in metrics]
        places = [group * pitch + at for group in range(len(metrics))]
        means = [float(np.mean(values or [0.0])) for values in seeds]
        axes.barh(places, means, height=0.8, label=arm, color=f"C{at % 10}")
        for place, values in zip(places, seeds, strict=True):
            axes.plot(values, [place] * len(values), "o", color="black", markersize=2)
    axes.set_yticks([group * pitch + pitch / 2 - 1 for group in range(len(metrics))], metrics)
    axes.invert_yaxis()
    axes.set_xlabel(finding.label)
    axes.grid(axis="x", linewidth=0.4)
    axes.set_axisbelow(True)
    if len(arms) > 1:
        figure.legend(loc="outside upper center", ncols=min(5, len(arms)), frameon=False)


def _lines(figure: Figure, finding: Finding, records: Sequence[Record]) -> None:
    """A panel per arm, a line per name before the @, each seed's thin beside the mean."""
    arms, metrics = arms_of(records), metrics_of(finding.lines, records)
    figure.set_size_inches(WIDTH, PANEL)
    panels = figure.subplots(1, len(arms), sharey=True, squeeze=False)[0]
    for arm, axes in zip(arms, panels, strict=True):
        for at, name in enumerate(dict.fromkeys(metric.split("@")[0] for metric in metrics)):
            mine = [metric for metric in metrics if metric.split("@")[0] == name]
            mine.sort(key=lambda metric: int(metric.split("@")[1]))
            sizes = [int(metric.split("@")[1]) for metric in mine]
            seeds = np.array([list(values_of(records, arm, metric).values()) for metric in mine])
            axes.plot(sizes, seeds.mean(axis=1), "o-", markersize=3, color=f"C{at}", label=name)
            axes.plot(sizes, seeds, linewidth=0.5, alpha=0.5, color=f"C{at}")
        axes.set_title(arm, loc="left")
        axes.grid(axis="y", linewidth=0.4)
    panels[0].set_ylabel(finding.label)
    panels[-1].legend(frameon=False)
