"""How many steps may be in flight: few enough that their targets fit the object store."""

from __future__ import annotations

import math
from collections.abc import Mapping

import ray

from radio.errors import RadioError
from radio.targets.target_maker import CodedTarget

SHARE = 0.6  # of the smallest node's store that a window may take; the rest is views and slack


class Window:
    """Counts bytes: one step until the first one's are known, then as many as fit.

    Args:
        most: how many steps there may be, whatever they weigh.
        room: bytes for all steps in flight; SHARE of the smallest node's store if not given.
    """

    def __init__(self, most: int, room: float | None = None) -> None:
        self.most = most
        self.room = room_in_store() if room is None else room
        self._largest = 0

    def steps(self, others: int = 0) -> int:
        """Return how many steps may be in flight, 1 at least, beside the one the student works on.

        `others` are in flight already, of somebody who reads the same stream.
        """
        if not self._largest:
            return 1
        return max(1, min(self.most, int(self.room // self._largest) - 1 - others))

    def saw(self, answers: Mapping[str, Mapping[int, CodedTarget]], step: int) -> None:
        """Note the bytes of a step's targets.

        Raises:
            RadioError: not even one step fits.
        """
        sizes = {
            name: sum(target.num_bytes for target in targets.values())
            for name, targets in answers.items()
        }
        self._largest = max(self._largest, sum(sizes.values()))
        if self._largest > self.room:
            most = max(sizes, key=lambda name: sizes[name])
            raise RadioError(
                f"the targets of step {step} take {self._largest / 1e6:.0f} MB (most of all "
                f"teacher '{most}', {sizes[most] / 1e6:.0f} MB), but a node's object store has "
                f"room for {self.room / 1e6:.0f} MB of them; raise cluster.object_store_mb (or "
                "`ray start --object-store-memory`), set codec=int8, or lower the batch"
            )


def most_steps(wanted: int | None, replicas: int, ranks: int = 1) -> int:
    """Return how many steps one of `ranks` students may have in flight, where nobody says it.

    That is one for each replica and one to spare, so that a pass may be made again while the
    student has something to do.
    """
    return math.ceil(replicas / ranks) + 1 if wanted is None else wanted


def room_in_store() -> float:
    """Return the bytes that a window may take in the object store of any node."""
    stores = [
        node["Resources"].get("object_store_memory", 0.0) for node in ray.nodes() if node["Alive"]
    ]
    return SHARE * min((store for store in stores if store), default=0.0)
