"""What the pages of results and of findings are written with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from radio.evaluation.result import Interval
from radio.files import write_whole

NONE = "–"


def number(
    value: float | None, interval: Interval | None = None, digits: int = 3, sign: str = ""
) -> str:
    """Return `0.534 [0.503, 0.565]`, by two digits what is below 0.01; `sign` "+" shows a plus."""
    if value is None:
        return NONE
    small = 0 < abs(value) < 0.01
    shown = f"{value:{sign}.2g}" if small else f"{value:{sign}.{digits}f}"
    return shown if interval is None else f"{shown} {brackets(interval, digits)}"


def brackets(interval: Interval | None, digits: int = 3) -> str:
    """Return `[0.503, 0.565]`."""
    if interval is None:
        return NONE
    return f"[{', '.join(number(bound, digits=digits) for bound in interval)}]"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a table and an empty one."""
    if not rows:
        return ["Nothing yet.", ""]
    return [*(f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *rows)), ""]


def write_page(path: Path, lines: Sequence[str]) -> None:
    """Write a page whole, making its folder, and say where it is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, "\n".join(lines).rstrip() + "\n")
    print(path)
