"""One figure per finding: bars with a dot for each seed, or lines over px."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.findings.compare import arms_of, mean, metrics_of
from benchmarks.findings.declare import Figure
from benchmarks.findings.records import Record

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WIDTH, BAR, PANEL = 7.2, 0.16, 2.4  # inches: width, of a bar's height, of a panel of lines
STYLE: Any = {
    "font.size": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "svg.fonttype": "none",
}


def save(figure: Figure, records: Sequence[Record], path: Path) -> None:
    """Draw a finding's figure as SVG, the same bytes for the same records."""
    import matplotlib

    with matplotlib.rc_context({**STYLE, "svg.hashsalt": path.stem}):
        drawn = (_bars if figure.kind == "bars" else _lines)(figure, records)
        path.parent.mkdir(parents=True, exist_ok=True)
        drawn.savefig(path, metadata={"Date": None, "Creator": None})


def _bars(figure: Figure, records: Sequence[Record]) -> Any:
    from matplotlib.figure import Figure as Canvas

    arms, metrics = arms_of(records), metrics_of(figure.patterns, records)
    height = 0.7 + BAR * len(metrics) * (len(arms) + 1)
    canvas = Canvas(figsize=(WIDTH, height), layout="constrained")
    axes = canvas.add_subplot()
    for at, (arm, by_seed) in enumerate(arms.items()):
        places = [group * (len(arms) + 1) + at for group in range(len(metrics))]
        values = [mean(by_seed, metric) or 0.0 for metric in metrics]
        axes.barh(places, values, height=0.8, label=arm, color=f"C{at % 10}")
        for place, metric in zip(places, metrics, strict=True):
            dots = [each.scores[metric] for each in by_seed.values() if metric in each.scores]
            axes.plot(dots, [place] * len(dots), "o", color="black", markersize=2)
    middle = (len(arms) - 1) / 2
    axes.set_yticks([g * (len(arms) + 1) + middle for g in range(len(metrics))], metrics)
    axes.invert_yaxis()
    axes.set_xlabel(figure.label)
    axes.grid(axis="x", linewidth=0.4)
    axes.set_axisbelow(True)
    if len(arms) > 1:
        canvas.legend(loc="outside upper center", ncols=min(5, len(arms)), frameon=False)
    return canvas


def _lines(figure: Figure, records: Sequence[Record]) -> Any:
    """A panel per name before the @, or one for all where there is one arm."""
    from matplotlib.figure import Figure as Canvas

    arms, metrics = arms_of(records), metrics_of(figure.patterns, records)
    names = list(dict.fromkeys(metric.split("@")[0] for metric in metrics))
    panels = [names] if len(arms) == 1 else [[name] for name in names]
    canvas = Canvas(figsize=(WIDTH, PANEL * -(-len(panels) // 2) + 0.3), layout="constrained")
    for number, panel in enumerate(panels):
        axes = canvas.add_subplot(-(-len(panels) // 2), min(2, len(panels)), number + 1)
        _curves(axes, arms, panel, metrics)
        axes.set_title(panel[0] if len(panel) == 1 else figure.label, loc="left")
        axes.grid(axis="y", linewidth=0.4)
    canvas.axes[-1].legend(frameon=False)
    return canvas


def _curves(axes: Axes, arms: Any, names: Sequence[str], metrics: Sequence[str]) -> None:
    lines = [(arm, name) for arm in arms for name in names]
    for at, (arm, name) in enumerate(lines):
        mine = sorted(
            (m for m in metrics if m.split("@")[0] == name), key=lambda m: int(m.split("@")[1])
        )
        sizes = [int(metric.split("@")[1]) for metric in mine]
        label = arm if len(names) == 1 else name
        axes.plot(
            sizes,
            [mean(arms[arm], metric) or 0.0 for metric in mine],
            marker="o",
            markersize=3,
            color=f"C{at}",
            label=label,
        )
        for record in arms[arm].values():
            there = [m for m in zip(sizes, mine, strict=True) if m[1] in record.scores]
            values = [record.scores[metric] for _, metric in there]
            axes.plot([m[0] for m in there], values, linewidth=0.5, alpha=0.5, color=f"C{at}")
