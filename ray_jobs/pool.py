"""A pool of replicas that serve the same pure calls: dispatch, second asks, recovery.

A call's answer depends on its arguments alone, so any replica may give it, twice if need be. Work
goes to the replica that has least of it; one that died or hangs gets none until it is back. What
nobody can take yet stays here, so that what was lost goes first when somebody can.
"""

from __future__ import annotations

import logging
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import RayTaskError

from radio.errors import RadioError
from ray_jobs.placement import offers
from ray_jobs.replica import LOST, Replica

log = logging.getLogger("ray_jobs")
Send = Callable[[Any, bool], Any]  # (a replica's handle, whether it is the first try) -> reference
USUAL_OF = 9  # passes whose median is the usual time
LEAST_HEDGE_SECONDS = 0.5  # a shorter delay is noise
LOOK_SECONDS = 0.25  # between two looks at who hangs
NOBODY_UP_SECONDS = 15.0  # between two lines that say so
PAUSE_SECONDS = 0.05  # between two looks at replicas that are down


@dataclass
class Ask:
    """A piece of work: how it is sent, the calls that may answer it, and the answer.

    `what` is what errors call it; `began` is when somebody stood still for it.
    """

    send: Send
    what: str
    calls: dict[Any, Replica] = field(default_factory=dict)
    tries: int = 0
    hedged: bool = False
    began: float | None = None
    answered: bool = False
    value: Any = None


class Pool:
    """Replicas of one kind of worker; each has a method `ready`.

    Args:
        name: what errors and logs call it.
        handles: the replicas' handles.
        call_timeout: seconds after which a replica counts as hung and is started anew.
        give_up: seconds after which work that nobody answers is an error.
        hedge: for how many times the usual seconds a replica may be silent before another one is
            asked, too; None: for ever.
        expected: what `ready` of a replica that comes back must say; anything if None.
        upstream: the pool that answers what this one's calls wait for.
        greeting: what `ready` is given.
        depth: pieces of work that a replica may have; more than one where nobody looks often.
    """

    def __init__(
        self,
        name: str,
        handles: Sequence[Any],
        call_timeout: float,
        give_up: float,
        hedge: float | None = None,
        expected: Any = None,
        upstream: Pool | None = None,
        greeting: tuple[Any, ...] = (),
        depth: int = 1,
    ) -> None:
        self.name = name
        self.replicas = [
            Replica(handle, name, call_timeout, expected, greeting) for handle in handles
        ]
        self.give_up, self.hedge, self.upstream, self.depth = give_up, hedge, upstream, depth
        self.retries = self.hedges = 0
        self._usual: deque[float] = deque(maxlen=USUAL_OF)
        self._nobody_up: tuple[float, float] | None = None  # since when, and when it was said

    @property
    def in_flight(self) -> int:
        """Calls that nobody has answered yet."""
        return sum(len(replica.calls) for replica in self.replicas)

    def ask(self, send: Send, what: str) -> Ask:
        """Send a piece of work to the replica that has least to do, now or when it is polled."""
        ask = Ask(send, what)
        self._send(ask)
        return ask

    def send(self, send: Send) -> Sequence[Any]:
        """Send work whose answers (references, all of one call) go elsewhere; nobody asks again."""
        self.watch()
        replica = min(self._up(), key=lambda r: len(r.calls), default=self.replicas[0])
        refs: Sequence[Any] = send(replica.handle, True)
        replica.sent(refs[0], loose=True)
        return refs

    def tell(self, method: str) -> None:
        """Call a method without arguments of every replica that is up; nobody waits for it."""
        for replica in self._up():
            getattr(replica.handle, method).remote()

    def poll(self, ask: Ask, is_next: bool = True) -> bool:
        """Return whether a piece of work is answered; what was lost is asked for again.

        Patience begins when the work `is_next`: somebody waits.

        Raises:
            RadioError: the worker's own mistake, or nobody answers.
        """
        if ask.answered:
            return True
        for call in ray.wait(list(ask.calls), timeout=0)[0] if ask.calls else ():
            replica = ask.calls.pop(call)
            try:
                ask.value = ray.get(call)
            except (*LOST, RayTaskError) as error:
                self._lost(ask, replica, error)
                continue
            replica.deaths = 0
            ask.answered = True
            ask.calls.clear()  # a slower call stays with its replica until it is answered
            return True
        if not ask.calls:
            self._send(ask)
        if is_next:
            ask.began = ask.began or time.monotonic()
            self._check_patience(ask, time.monotonic() - ask.began)
        self._hedge(ask)
        return False

    def took(self, seconds: float) -> None:
        """Note how long a pass was by the worker's own clock."""
        self._usual.append(seconds)

    def watch(self) -> None:
        """Look who answered, who is back and who hangs, here and upstream."""
        if self.upstream is not None:
            self.upstream.watch()
        for replica in self.replicas:
            replica.look()
        self._say_if_nobody_is_up()

    def close(self) -> None:
        """End every replica for good."""
        for replica in self.replicas:
            ray.kill(replica.handle)

    def _up(self) -> Iterator[Replica]:
        return (replica for replica in self.replicas if replica.up)

    def _free(self) -> Replica | None:
        """Return who has least to do of those that can take work; a late one where all are late."""
        can = (each for each in self._up() if len(each.calls) < self.depth)
        return min(can, key=lambda each: (self._late(each), len(each.calls)), default=None)

    def _late(self, replica: Replica) -> bool:
        """Return whether a replica is silent for much longer than a pass usually takes."""
        if self.hedge is None or len(self._usual) < USUAL_OF:
            return False
        usual = self.hedge * statistics.median(self._usual)
        return replica.silent > max(LEAST_HEDGE_SECONDS, usual)

    def _send(self, ask: Ask, replica: Replica | None = None) -> None:
        """Send work to a replica, the least loaded if not given; to none if none can take it."""
        if (replica := replica or self._free()) is None:
            return
        call = ask.send(replica.handle, ask.tries == 0 and not ask.hedged)
        replica.sent(call)
        ask.calls[call] = replica

    def _check_patience(self, ask: Ask, waited: float) -> None:
        retired = sum(each.retired for each in self.replicas)
        if waited > self.give_up or retired == len(self.replicas):
            raise RadioError(
                f"{self.name} did not answer {ask.what} in {waited:.0f} s ({retired} of "
                f"{len(self.replicas)} replicas are given up); is a node out of memory? See the "
                "Ray logs, or raise cluster.call_timeout_seconds and cluster.give_up_seconds"
            )

    def _hedge(self, ask: Ask) -> None:
        """Ask another replica too, once, where the one that has the work is late."""
        asked = list(ask.calls.values())
        if ask.hedged or not asked or not all(self._late(replica) for replica in asked):
            return
        if (other := self._free()) is None or self._late(other):
            return
        ask.hedged = True
        self.hedges += 1
        log.info(
            "%s is silent for %.1f s; another is asked for %s, too",
            self.name,
            min(replica.silent for replica in asked),
            ask.what,
        )
        self._send(ask, other)

    def _lost(self, ask: Ask, replica: Replica, error: Exception) -> None:
        """Note that a call was lost; raise what is no loss but a mistake."""
        cause = error
        while isinstance(cause, RayTaskError):
            cause = cause.cause
        if isinstance(cause, RadioError):
            raise cause from None
        if not isinstance(cause, LOST):
            raise error
        if cause is error:  # else what it was given was lost, and the replica is well
            replica.fell()
        ask.tries += 1
        self.retries += 1
        lost = type(cause).__name__
        log.warning("%s was lost in %s (%s); asking again", self.name, ask.what, lost)

    def _say_if_nobody_is_up(self) -> None:
        if any(True for _ in self._up()):
            self._nobody_up = None
            return
        now = time.monotonic()
        since, said = self._nobody_up or (now, now)
        if now - said > NOBODY_UP_SECONDS:
            said = now
            log.info(
                "%s: none of %d is up for %.0f s, without a place or still loading; the nodes "
                "offer %s",
                self.name,
                len(self.replicas),
                now - since,
                offers(),
            )
        self._nobody_up = since, said


def rest(work: Sequence[tuple[Pool, Ask]]) -> None:
    """Wait until something may have happened to work that is not answered yet."""
    calls = [call for _, ask in work for call in list(ask.calls)]  # a watch may change them
    if calls:
        ray.wait(calls, timeout=LOOK_SECONDS)
    if not all(ask.calls or ask.answered for _, ask in work):  # nobody can take it: look again soon
        time.sleep(PAUSE_SECONDS)


def answer(pool: Pool, ask: Ask) -> Any:
    """Return the answer to a single piece of work; raises as `Pool.poll`."""
    while not pool.poll(ask):
        rest([(pool, ask)])
        pool.watch()
    return ask.value
