"""Results as tables for a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.table import Table

from radio.evaluation.result import Interval, Result

if TYPE_CHECKING:
    from radio.training.metrics import Row

EXTREMES = 3  # classes shown at either end
SHOWN = 8  # values of a list; longer ones are left to the JSON file
LABEL = "label"


def result_table(measured: Sequence[tuple[Result, float]]) -> Table:
    """Return a line per result and its seconds: target, task, score, interval, pictures."""
    table = Table(box=None)
    table.add_column("target")
    table.add_column("task")
    for column in ("score", "95 % interval", "pictures", "seconds"):
        table.add_column(column, justify="right")
    for result, seconds in measured:
        table.add_row(
            result.target,
            result.task,
            number(result.score),
            _interval(result.interval),
            str(result.details.get("pictures", "-")),
            f"{seconds:.1f}",
        )
    return table


def detail_tables(result: Result) -> list[Table]:
    """Return what a result's details hold: single values, then lists of rows, each as a table."""
    title = f"{result.task}: {result.details.get('score_is', 'details')}"
    single = Table(title=title, box=None, show_header=False, title_justify="left")
    tables = [single]
    for name, value in result.details.items():
        rows = _rows(value)
        if name in ("score_is", "pictures"):
            continue
        if name == "curve":
            tables.append(_curve_table(value))
        elif rows:
            tables.append(_rows_table(_words(name), rows))
        elif isinstance(value, Mapping):
            for inner, text in _extremes(value):
                single.add_row(f"{_words(name)}: {inner}", text)
        else:
            single.add_row(_words(name), _text(value))
    return [table for table in tables if table.row_count]


def number(value: float) -> str:
    """Return a score as text: three decimals, or four digits of a large one."""
    return f"{value:.3f}" if abs(value) < 100 else f"{value:.4g}"


def _rows(value: Any) -> list[Mapping[str, Any]]:
    """Return a list of mappings, or a mapping of mappings with their names as a first column."""
    if isinstance(value, Sequence) and value and all(isinstance(row, Mapping) for row in value):
        return list(value)
    if isinstance(value, Mapping) and value and all(isinstance(v, Mapping) for v in value.values()):
        return [{"": name, **row} for name, row in value.items()]
    return []


def _rows_table(title: str, rows: Sequence[Mapping[str, Any]]) -> Table:
    table = Table(title=title, box=None, title_justify="left")
    columns = list(dict.fromkeys(name for row in rows for name in row))
    for column in columns:
        is_text = any(isinstance(row.get(column), str) for row in rows)
        table.add_column(_words(column), justify="left" if is_text else "right")
    for row in rows:
        table.add_row(*(_text(row[name]) if name in row else "-" for name in columns))
    return table


def _curve_table(curve: Mapping[str, Any]) -> Table:
    """Return a curve's points, evenly thinned to SHOWN."""
    names = list(curve["y"])
    table = Table(box=None)
    for column in (curve[LABEL], *names):
        table.add_column(str(column), justify="right")
    count = len(curve["x"])
    for at in sorted({round(i * (count - 1) / (SHOWN - 1)) for i in range(SHOWN)}):
        table.add_row(_text(curve["x"][at]), *(_text(curve["y"][name][at]) for name in names))
    return table


def _extremes(values: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    """Yield every value of a short mapping, or the highest and lowest numbers of a long one."""
    if len(values) <= SHOWN:
        for name, value in values.items():
            yield str(name), _text(value)
        return
    known = {name: value for name, value in values.items() if isinstance(value, int | float)}
    ranked = sorted(known.items(), key=lambda pair: (-pair[1], pair[0]))
    for word, pairs in (("highest", ranked[:EXTREMES]), ("lowest", ranked[-EXTREMES:])):
        yield word, ", ".join(f"{name} {_text(value)}" for name, value in pairs)


def _text(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "-"}[value]
    if isinstance(value, float):
        return number(value) if value == 0 or abs(value) >= 1e-3 else f"{value:.2g}"
    if isinstance(value, list | tuple):
        shown = ", ".join(_text(item) for item in value[:SHOWN])
        return f"{shown}, ... ({len(value)})" if len(value) > SHOWN else shown
    return str(value)


def _interval(interval: Interval | None) -> str:
    return "-" if interval is None else f"{number(interval[0])} to {number(interval[1])}"


def _words(name: str) -> str:
    return name.replace("_", " ")


def held_out_table(before: Sequence[Row], after: Sequence[Row]) -> Table:
    """Return the table per teacher and resolution: cosine and fidelity, before and after."""
    earlier = {(row.teacher, row.image_size, row.merged): row for row in before}
    table = Table(title="held-out photographs (fidelity 1 = predicts the mean)", box=None)
    for column in ("teacher", "px", "cosine before", "after", "fidelity before", "after"):
        table.add_column(column, justify="left" if column == "teacher" else "right")
    for row in sorted(after, key=lambda row: (row.merged, row.image_size)):
        first = earlier.get((row.teacher, row.image_size, row.merged))
        table.add_row(
            row.teacher,
            f"{row.image_size}{' merged' if row.merged else ''}",
            _short(None if first is None else first.cosine),
            _short(row.cosine),
            _short(None if first is None else first.fidelity),
            _short(row.fidelity),
        )
    return table


def _short(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
