"""Figures of a report: curves as SVG in the page's own colours, pictures as data: addresses."""

from __future__ import annotations

import base64
import io
import math
import re
import statistics
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import UInt8

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PHOTO_SIDE = 512  # px of a photograph's longer side at most
MOST_POINTS = 400  # of a curve; longer ones are drawn as means of neighbours
MARKED_POINTS = 12  # a curve of fewer shows each of them
LOG_RATIO = 8.0  # a curve that falls further than this is drawn on a logarithmic axis
NUM_COLOURS = 8  # --c0 ... --c7 in the template
# Colours that stand for the page's own, so that figures follow its light and dark scheme.
INK, RULE = "#010203", "#040506"
STYLE: Any = {
    **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), INK),
    **dict.fromkeys(("axes.edgecolor", "grid.color"), RULE),
    **dict.fromkeys(("axes.spines.top", "axes.spines.right"), False),
    "font.size": 9,
    "lines.linewidth": 1.6,
    "svg.fonttype": "none",  # text stays text, in the page's own font
}
Curve = tuple[list[int], list[float]]


def curve(steps: Iterable[int], values: Iterable[float | None]) -> Curve:
    """Return (steps, values) where there is one, in at most MOST_POINTS means of neighbours."""
    pairs = zip(steps, values, strict=True)
    found = [(step, value) for step, value in pairs if value is not None]
    width = math.ceil(len(found) / MOST_POINTS) or 1
    groups = [found[at : at + width] for at in range(0, len(found), width)]
    return (
        [group[-1][0] for group in groups],
        [statistics.fmean(value for _, value in group) for group in groups],
    )


def _falls_far(curves: Mapping[str, Curve]) -> bool:
    values = [value for _, line in curves.values() for value in line if math.isfinite(value)]
    return bool(values) and min(values) > 0 and max(values) > LOG_RATIO * min(values)


def panel(
    title: str,
    curves: Mapping[str, Curve],
    *,
    bottom: float | None = None,
    top: float | None = None,
    rules: Iterable[int] = (),
) -> dict[str, str]:
    """Draw lines over steps; the line named "" is the student's own, dashed where it has company.

    Returns:
        title and svg. The key of line colours is the template's, so names never meet the SVG.
    """
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    with matplotlib.rc_context(STYLE | {"svg.hashsalt": title}):
        figure = Figure(figsize=(4.2, 2.4), layout="constrained")
        axes = figure.add_subplot()
        for at, (name, (steps, values)) in enumerate(curves.items()):
            axes.plot(
                steps,
                values,
                color=INK if name == "" else f"#0000f{at % NUM_COLOURS}",
                linestyle="--" if at >= NUM_COLOURS or (name == "" and len(curves) > 1) else "-",
                marker="o" if len(steps) < MARKED_POINTS else "",
                markersize=3.5,
            )
        for step in rules:
            axes.axvline(step, color=INK, linewidth=0.8, linestyle=":")
        if bottom is None and _falls_far(curves):
            _logarithmic(axes)
        axes.set_ylim(bottom, top)
        whole = MaxNLocator(7, steps=[1, 2, 5, 10], integer=True, min_n_ticks=1)
        axes.xaxis.set_major_locator(whole)
        axes.set_xlabel("step")
        axes.grid(axis="y", linewidth=0.6)
        axes.set_axisbelow(True)
        file = io.StringIO()
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(file, format="svg", transparent=True, metadata=nothing)
    return {"title": title, "svg": _inline(file.getvalue(), title)}


def _logarithmic(axes: Axes) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _inline(svg: str, title: str) -> str:
    """Make matplotlib's SVG part of a page: no prolog, ids of its own, the page's colours."""
    from markupsafe import Markup

    body = svg[svg.index("<g id=") : svg.rindex("</svg>")]
    box = svg.split('viewBox="', 1)[1].split('"', 1)[0]
    own = re.sub(r"\W+", "-", title)
    for mark in ('id="', "url(#", 'href="#'):
        body = body.replace(mark, f"{mark}{own}-")
    body = body.replace(INK, "var(--ink)").replace(RULE, "var(--rule)")
    body = re.sub(r"#0000f(\d)", r"var(--c\1)", body)
    frame = Markup('<svg viewBox="{}" role="img" aria-label="{}">{}</svg>')
    return frame.format(box, f"{title} over steps", Markup(body))


def data_address(pixels: UInt8[np.ndarray, "h w 3"], kind: str) -> str:
    """Return a picture of at most PHOTO_SIDE px as a data: address."""
    from PIL import Image

    image = Image.fromarray(pixels)
    image.thumbnail((PHOTO_SIDE, PHOTO_SIDE))
    file = io.BytesIO()
    image.save(file, format=kind, quality=90)
    return f"data:image/{kind.lower()};base64," + base64.b64encode(file.getvalue()).decode("ascii")
