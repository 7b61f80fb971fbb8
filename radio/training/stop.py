"""Ctrl-C and SIGTERM end a run between two steps, after a checkpoint; so does the file out/.stop.

Where somebody else starts the student's processes, and gets the signal, the file tells them.
"""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

log = logging.getLogger("radio.train")
FILE = ".stop"


class StopSignal:
    """Inside the block the first signal only asks, as `out`/.stop does; a second one interrupts.

    `asked` is called at the first signal.
    """

    def __init__(self, out: Path, asked: Callable[[], None] = lambda: None) -> None:
        self._file, self._asked = out / FILE, asked
        self._signalled = False
        self._before: dict[int, Any] = {}

    @property
    def requested(self) -> bool:
        """Whether the run is to end after this step."""
        return self._signalled or self._file.exists()

    def __enter__(self) -> StopSignal:
        if threading.current_thread() is threading.main_thread():  # Python allows no other
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._ask)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self._signalled:
            raise KeyboardInterrupt
        self._signalled = True
        self._asked()
        log.warning("stopping after this step; once more to stop at once")


@contextmanager
def asked_by_file(out: Path) -> Iterator[StopSignal]:
    """Hand signals on to the processes that train in `out`, by a file that is gone afterwards."""
    file = out / FILE
    file.unlink(missing_ok=True)  # of a run that was killed while it stopped

    def ask() -> None:
        out.mkdir(parents=True, exist_ok=True)
        file.touch()

    try:
        with StopSignal(out, ask) as stop:
            yield stop
    finally:
        file.unlink(missing_ok=True)
