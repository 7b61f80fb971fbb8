"""Tell the person at the terminal what is done, at which rate, and how long it will take."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator
from types import TracebackType
from typing import TypeVar

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

log = logging.getLogger("radio")
T = TypeVar("T")
Report = Callable[[int, int], None]  # (done, total) of a long work
LINE_SECONDS = 10.0  # without a terminal: a log line this often


class ProgressDisplay:
    """A live bar and a line on stderr, or a log line every few seconds without a terminal."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True)
        self.progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=self.console,
        )
        self.task = self.progress.add_task("", total=None)
        self.text = Text(style="dim")
        self.live = Live(
            Group(self.progress, self.text), console=self.console, refresh_per_second=4
        )
        self._last_line = 0.0
        self._started = time.monotonic()
        self._first: int | None = None

    def __enter__(self) -> ProgressDisplay:
        if self.console.is_terminal:
            self.live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.live.stop()

    def phase(self, name: str, total: int | None = None) -> None:
        """Begin a phase: waiting for teachers, fitting, training, encoding."""
        self._started = time.monotonic()
        self._first = None
        self.progress.reset(self.task, description=name, total=total)
        self.text.plain = ""
        if not self.console.is_terminal:
            log.info("%s", name)
        self._last_line = time.monotonic()

    def update(self, done: int, total: int, text: str = "") -> None:
        """Show how far the phase is, and a text beside it."""
        self.progress.update(self.task, completed=done, total=total)
        self.text.plain = text
        if self._first is None or done <= self._first:  # the latter: back to a checkpoint
            self._first = done - 1
        now = time.monotonic()
        if self.console.is_terminal or (now - self._last_line < LINE_SECONDS and done < total):
            return
        self._last_line = now
        rate = (done - self._first) / max(1e-9, now - self._started)
        shown = text or f"{rate:.1f}/s"
        log.info("%d/%d  %s  ETA %.0f s", done, total, shown, (total - done) / rate)


def told(items: Iterable[T], total: int, report: Report | None) -> Iterator[T]:
    """Yield the items, reporting each once it has been worked on."""
    for done, item in enumerate(items, start=1):
        yield item
        if report is not None:
            report(done, total)
