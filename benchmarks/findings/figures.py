"""One figure per finding: points, a dot for each seed, or lines over the number behind the @."""

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
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH, ROW, PANEL = 7.2, 0.18, 2.8  # inches: width, of a point's row, of a panel of lines
MOST_ACROSS = 3  # panels of points
Values = dict[str, list[float]]  # of seeds, by what stands at their row


def save(finding: Finding, records: Sequence[Record], path: Path) -> None:
    """Draw a finding's figure as SVG, the same bytes for the same records."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({**STYLE, "font.size": 8, "svg.hashsalt": path.stem}):
        figure = Figure(layout="constrained")
        (_points if finding.points else _lines)(figure, finding, records)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, metadata={"Date": None, "Creator": None})


def _points(figure: Figure, finding: Finding, records: Sequence[Record]) -> None:
    """A panel per metric with a row per arm; of one arm a single panel with a row per metric.

    Every metric has a scale of its own, since one may be tens of times another.
    """
    arms, metrics = arms_of(records), metrics_of(finding.points, records)

    def seeds(arm: str, metric: str) -> list[float]:
        return [*values_of(records, arm, metric).values()]

    if len(arms) == 1:
        panels = {"": {metric: seeds(arms[0], metric) for metric in metrics}}
    else:
        panels = {metric: {arm: seeds(arm, metric) for arm in arms} for metric in metrics}
    across = 2 if len(panels) == 4 else min(MOST_ACROSS, len(panels))
    down = -(-len(panels) // across)
    rows = max(len(panel) for panel in panels.values())
    figure.set_size_inches(WIDTH, 0.5 + down * (0.7 + ROW * rows))
    grid = figure.subplots(down, across, sharey=True, squeeze=False).flatten()
    for (title, panel), axes in zip(panels.items(), grid, strict=False):
        axes.set_title(title, loc="left")
        _rows(axes, panel)
    for axes in grid[len(panels) :]:
        axes.remove()
    grid[0].invert_yaxis()  # which all share
    figure.supxlabel(finding.label)


def _rows(axes: Axes, panel: Values) -> None:
    for row, values in enumerate(panel.values()):
        if values:
            axes.plot(values, [row] * len(values), "o", color=f"C{row % 10}", markersize=3.5)
            axes.plot([np.mean(values)], [row], "|", color="black", markersize=11)
    axes.set_yticks(range(len(panel)), list(panel))
    axes.grid(axis="x", linewidth=0.4)
    axes.set_axisbelow(True)
    axes.margins(x=0.1, y=0.1)
    axes.locator_params(axis="x", nbins=5)  # labels of a narrow panel would run into each other


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
        axes.set_xlabel(finding.across)
        axes.grid(axis="y", linewidth=0.4)
    panels[0].set_ylabel(finding.label)
    panels[-1].legend(frameon=False)
