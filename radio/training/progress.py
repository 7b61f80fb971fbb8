"""Tell the person at the terminal what the run does, at which rate, and what it waits for."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from types import TracebackType

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from radio.training.metrics import Row

log = logging.getLogger("radio.train")
LINE_SECONDS = 10.0  # without a terminal: a log line this often


class TrainingProgress:
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

    def __enter__(self) -> TrainingProgress:
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
        """Begin a phase: waiting for teachers, fitting, training, evaluation."""
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
        if self._first is None:
            self._first = done - 1
        now = time.monotonic()
        if self.console.is_terminal or (now - self._last_line < LINE_SECONDS and done < total):
            return
        self._last_line = now
        rate = (done - self._first) / max(1e-9, now - self._started)
        log.info("%d/%d  %s  ETA %.0f s", done, total, text, (total - done) / rate)


def describe(
    losses: Mapping[str, float], images_per_second: float, wait_share: float, rows: Sequence[Row]
) -> str:
    """Return the training line: loss per teacher, rate, share of waiting, last held-out fidelity.

    A teacher's loss is the sum of its summary's and features'; the fidelity is the worst one.
    """
    teachers = dict.fromkeys(name.split("/")[0] for name in losses)
    by_teacher = {
        teacher: sum(loss for name, loss in losses.items() if name.split("/")[0] == teacher)
        for teacher in teachers
    }
    shown = " ".join(f"{teacher} {loss:.2f}" for teacher, loss in by_teacher.items())
    worst = min((row.fidelity for row in rows if not row.merged), default=None)
    fidelity = "" if worst is None else f", fidelity {worst:.2f}"
    rate = f"{images_per_second:.1f} images/s, {wait_share:.0%} waiting for teachers"
    return f"loss {shown}, {rate}{fidelity}"
