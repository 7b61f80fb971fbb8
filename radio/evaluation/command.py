"""What `radio evaluate` does with its words: measure, draw, and lay out as tables."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from radio.errors import RadioError
from radio.evaluation.evaluate import FIDELITY, check_tasks, evaluate, measure
from radio.evaluation.fidelity import rows_of
from radio.evaluation.figures import check_file, save_figure
from radio.evaluation.result import Options, Result
from radio.evaluation.tables import detail_tables, held_out_table, result_table
from radio.progress import ProgressDisplay

MeasureTasks = Callable[..., Iterator[Result]]  # as `radio.evaluation.evaluate.measure`
Json = dict[str, Any] | list[dict[str, Any]]


def run(
    target: str,
    tasks: Sequence[str],
    data: str | None,
    options: Options,
    figure: Path | None = None,
    measure_tasks: MeasureTasks = measure,
) -> tuple[Json, list[Table], RadioError | None]:
    """Return a target's result as JSON, a list of several tasks', and the tables that show it.

    `measure_tasks` is where tasks but fidelity are measured, in this process if not given. What a
    later of several tasks raises is returned beside the results of those before it.

    Raises:
        RadioError: as `evaluate`; a figure of several tasks, or of no .png or .svg.
    """
    check_tasks(tasks)
    if figure is not None:
        check_file(figure)
        if len(tasks) > 1:
            raise RadioError(
                f"a figure shows one task, not {', '.join(tasks)}; ask for them singly"
            )
    with ProgressDisplay() as progress:
        progress.phase(", ".join(tasks))
        if list(tasks) == [FIDELITY]:
            started = time.monotonic()
            found = evaluate(target, FIDELITY, data, progress.update, options)
            seconds = time.monotonic() - started
            low_high = found["interval"]
            result = Result(**found | {"interval": low_high and tuple(low_high)})
            if figure is not None:
                save_figure(result, figure)
            tables = [result_table([(result, seconds)])]
            return found, [*tables, held_out_table([], rows_of(found))], None
        measured, failed = _measured(measure_tasks(target, tasks, data, options, progress.update))
    if figure is not None:
        save_figure(measured[0][0], figure)
    as_json = [result.as_dict() for result, _ in measured]
    details = [table for result, _ in measured for table in detail_tables(result)]
    tables = [result_table(measured), *details]
    return as_json[0] if len(tasks) == 1 else as_json, tables, failed


def _measured(
    results: Iterator[Result],
) -> tuple[list[tuple[Result, float]], RadioError | None]:
    """Return results with their seconds and what ended them early, raised if there are none."""
    measured: list[tuple[Result, float]] = []
    started = time.monotonic()
    try:
        for result in results:
            measured.append((result, time.monotonic() - started))
            started = time.monotonic()
    except RadioError as error:
        if not measured:
            raise
        return measured, error
    return measured, None


def whole_numbers(option: str, text: str | None) -> tuple[int, ...] | None:
    """Return the numbers of `1,2,3`, or of a file behind @: by commas, spaces or lines.

    In a file what follows # is left out.

    Raises:
        RadioError: a file that cannot be read, or something that is no whole number.
    """
    if text is None:
        return None
    if text.startswith("@"):
        try:
            lines = Path(text[1:]).expanduser().read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise RadioError(f"{option}: cannot read {text[1:]}: {error}") from error
        text = " ".join(line.partition("#")[0] for line in lines)
    words = text.replace(",", " ").split()
    wrong = next((word for word in words if not word.isdecimal()), None)
    if wrong is not None or not words:
        raise RadioError(
            f"{option}: {wrong or 'nothing'!r} is no whole number; expected 1,2,3 or @FILE"
        )
    return tuple(int(word) for word in words)
