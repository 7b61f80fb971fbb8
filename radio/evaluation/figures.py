"""One small figure of a result: a curve where it has one, else bars."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from radio.errors import RadioError
from radio.evaluation.result import Result
from radio.evaluation.tables import number

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FORMATS = (".png", ".svg")
MOST_BARS = 40  # classes; of more the highest and lowest are drawn
WIDTH, CURVE_HEIGHT, BAR_HEIGHT = 6.4, 3.6, 0.2  # inches
VALUES = ("recall", "centred", "fidelity", "score", "iou", "value")  # of a row, by preference
BLUE, GREY = "#3b6ea8", "#888888"
STYLE: Any = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "svg.fonttype": "none",
}
Bar = tuple[str, float, Sequence[float] | None]  # label, value, interval


def save_figure(result: Result, path: str | Path) -> Path:
    """Draw a result to a .png or .svg file and return its path.

    Raises:
        RadioError: another suffix, or a folder that does not exist.
    """
    import matplotlib

    file = check_file(path)
    nothing = {"Date": None, "Creator": None} if file.suffix == ".svg" else {"Software": None}
    with matplotlib.rc_context(STYLE | {"svg.hashsalt": result.task}):
        draw(result).savefig(file, dpi=150, metadata=nothing)
    return file


def check_file(path: str | Path) -> Path:
    """Refuse a name that `save_figure` would not write to, before anything is measured."""
    file = Path(path)
    if file.suffix not in FORMATS:
        raise RadioError(f"a figure is written as {' or '.join(FORMATS)}, not to '{file.name}'")
    if not file.parent.is_dir():
        raise RadioError(f"the folder {file.parent} of the figure does not exist")
    return file


def draw(result: Result) -> Figure:
    """Return the figure: lines of `curve` or of a teacher each, else bars of classes or rows."""
    from matplotlib.figure import Figure

    curve = result.details.get("curve") or _teachers_curve(result.details)
    bars = [] if curve else _bars(result)
    height = CURVE_HEIGHT if curve else 1.3 + BAR_HEIGHT * max(3, len(bars))
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    axes = figure.add_subplot()
    if curve:
        _draw_curve(axes, curve)
    else:
        _draw_bars(axes, bars, result)
    what = result.details.get("score_is", "score")
    # Above the whole figure: long labels of bars leave little room above the axes.
    title = f"{result.task} of {result.target}\n{what}: {_score(result)}"
    figure.suptitle(title, x=0.01, ha="left", size="medium")
    return figure


def _score(result: Result) -> str:
    if result.interval is None:
        return number(result.score)
    low, high = (number(bound) for bound in result.interval)
    return f"{number(result.score)} ({low} to {high})"


def _teachers_curve(details: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return e over resolutions of every teacher, as mode-switch keeps them."""
    teachers, sizes = details.get("teachers"), details.get("sizes")
    if not isinstance(teachers, Mapping) or not sizes:
        return None
    curves = {name: row["e"] for name, row in teachers.items() if len(row["e"]) == len(sizes)}
    return {"label": "px", "x": sizes, "y": curves, "value": "e = 1 - 1 / fidelity", "zero": True}


def _draw_curve(axes: Axes, curve: Mapping[str, Any]) -> None:
    for name, values in curve["y"].items():
        marker = "o" if len(values) < 24 else ""
        axes.plot(curve["x"], values, marker=marker, markersize=3.5, label=name)
    if curve.get("log"):
        axes.set_xscale("log")
    elif len(curve["x"]) <= 12:
        axes.set_xticks(curve["x"], [str(x) for x in curve["x"]])
    values = [value for line in curve["y"].values() for value in line]
    if curve.get("log") and min(values) > 0 and max(values) > 50 * min(values):
        axes.set_yscale("log")
    elif curve.get("zero") or min(values) >= 0:
        axes.set_ylim(bottom=0)
    axes.set_xlabel(curve["label"])
    if len(curve["y"]) > 1:
        axes.set_ylabel(curve.get("value", ""))
        axes.legend(frameon=False)
    else:
        axes.set_ylabel(next(iter(curve["y"])))
    axes.grid(axis="y", linewidth=0.4)


def _draw_bars(axes: Axes, bars: Sequence[Bar], result: Result) -> None:
    places = list(range(len(bars)))
    axes.barh(places, [value for _, value, _ in bars], color=BLUE, height=0.7)
    for place, (_, _, interval) in zip(places, bars, strict=True):
        if interval is not None:
            axes.plot(interval, (place, place), color="black", linewidth=1)
    if len(bars) > 1 and "per_class" in result.details:
        axes.axvline(result.score, color=GREY, linewidth=0.8, linestyle="--")
    axes.set_yticks(places, [label for label, _, _ in bars])
    axes.set_ylim(len(bars) - 0.4, -0.6)  # the first on top
    axes.grid(axis="x", linewidth=0.4)
    axes.set_axisbelow(True)


def _bars(result: Result) -> list[Bar]:
    per_class = result.details.get("per_class")
    if isinstance(per_class, Mapping):
        return _class_bars(per_class)
    rows = result.details.get("rows")
    found = [_row_bar(row) for row in rows] if isinstance(rows, Sequence) else []
    return [bar for bar in found if bar] or [(result.target, result.score, result.interval)]


def _class_bars(per_class: Mapping[str, Any]) -> list[Bar]:
    """Return a bar per class that has a value, the highest first; the middle of many left out."""
    known = [(name, value) for name, value in per_class.items() if value is not None]
    ranked = sorted(known, key=lambda pair: (-pair[1], pair[0]))
    bars: list[Bar] = [(name, float(value), None) for name, value in ranked]
    if len(bars) <= MOST_BARS:
        return bars
    half = MOST_BARS // 2
    gap: Bar = (f"({len(bars) - MOST_BARS} between)", 0.0, None)
    return [*bars[:half], gap, *bars[-half:]]


def _row_bar(row: Mapping[str, Any]) -> Bar | None:
    value = next((row[name] for name in VALUES if isinstance(row.get(name), float)), None)
    if value is None:
        return None
    named = {k: v for k, v in row.items() if isinstance(v, str | int) and not isinstance(v, bool)}
    words = [str(v) if isinstance(v, str) else f"{k} {v}" for k, v in named.items()]
    return " ".join(words).replace("_", " "), float(value), row.get("interval")
