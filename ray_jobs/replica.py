"""One replica of a pool as its caller sees it: its calls, whether it hangs, died, or is back."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import (
    LocalRayletDiedError,
    NodeDiedError,
    ObjectLostError,
    ObjectStoreFullError,
    OutOfDiskError,
    OutOfMemoryError,
    RayActorError,
    RayTaskError,
    WorkerCrashedError,
)

from radio.errors import RadioError

log = logging.getLogger("ray_jobs")
LOST = (
    RayActorError,
    ObjectLostError,
    WorkerCrashedError,
    NodeDiedError,
    LocalRayletDiedError,
    OutOfMemoryError,
    OutOfDiskError,
    ObjectStoreFullError,
)
MOST_DEATHS = 3  # one after the other, without an answer in between


@dataclass
class Replica:
    """A process and its calls without an answer yet, by when they were sent.

    Args:
        handle: its actor, which has a method `ready`.
        name: what errors and logs call its pool.
        call_timeout: seconds after which it counts as hung and is started anew.
        expected: what `ready` must say when it comes back; anything if None.
        greeting: what `ready` is given.

    `loose` are calls whose answers go elsewhere; `heard` is when it last answered anything.
    `coming_back` is what it will say first after it fell, asked when it was `knocked`; one that
    dies too often is `retired`.
    """

    handle: Any
    name: str
    call_timeout: float
    expected: Any = None
    greeting: tuple[Any, ...] = ()
    calls: dict[Any, float] = field(default_factory=dict)
    loose: set[Any] = field(default_factory=set)
    heard: float = 0.0
    coming_back: Any = None
    knocked: float = 0.0
    deaths: int = 0
    retired: bool = False

    @property
    def up(self) -> bool:
        """Whether it may be given work."""
        return self.coming_back is None and not self.retired

    @property
    def silent(self) -> float:
        """Seconds since it was last heard of, while it has work."""
        now = time.monotonic()
        return now - max(min(self.calls.values(), default=now), self.heard)

    def sent(self, call: Any, loose: bool = False) -> None:
        """Note a call, and whether its answer goes elsewhere."""
        self.calls[call] = time.monotonic()
        if loose:
            self.loose.add(call)

    def knock(self) -> None:
        """Ask whether it is back."""
        self.coming_back = self.handle.ready.remote(*self.greeting)
        self.knocked = time.monotonic()

    def fell(self) -> None:
        """Give it no work until it says that it is ready; none at all if it fell too often."""
        if not self.up:
            return
        self.deaths += 1
        self.loose.clear()
        self.calls.clear()
        if self.deaths > MOST_DEATHS:
            self.retired = True
            log.warning(
                "a replica of %s died %d times in a row without an answer; it gets no more work",
                self.name,
                self.deaths,
            )
        else:
            self.knock()

    def look(self) -> None:
        """Forget calls that are answered, start it anew if it hangs, see whether it is back.

        Raises:
            RadioError: it came back with other weights, or its own mistake.
        """
        if self.calls:
            self._look_at_calls()
        if self.coming_back is not None:
            self._look_whether_back()

    def _look_at_calls(self) -> None:
        calls = list(self.calls)
        done, _ = ray.wait(calls, num_returns=len(calls), timeout=0, fetch_local=False)
        for call in done:
            self.heard = time.monotonic()
            self.calls.pop(call, None)
            if call in self.loose:
                self.loose.discard(call)
                self._note_loose(call)
        if (silent := self.silent) > self.call_timeout:
            log.warning("%s hangs for %.0f s; starting it anew", self.name, silent)
            ray.kill(self.handle, no_restart=False)
            self.fell()

    def _note_loose(self, call: Any) -> None:
        """Look whether a call whose answer goes elsewhere was lost; who needs it asks again."""
        try:
            ray.get(call)
        except LOST:
            self.fell()
        except RayTaskError:
            return  # said to whoever reads the answer
        else:
            self.deaths = 0

    def _look_whether_back(self) -> None:
        if not ray.wait([self.coming_back], timeout=0)[0]:
            if time.monotonic() - self.knocked > self.call_timeout:  # it hangs, building itself
                ray.kill(self.handle, no_restart=False)
                self.knock()
            return
        try:
            said = ray.get(self.coming_back)
        except LOST:  # not yet
            self.knock()
            return
        except RayTaskError as error:
            if isinstance(error.cause, RadioError):
                raise error.cause from None
            raise
        if self.expected is not None and said != self.expected:
            raise RadioError(
                f"{self.name} has other weights or options on another node; give every node the "
                "same files"
            )
        self.coming_back = None
