"""How many of the student's processes have a place: Ray is asked by placement groups.

Ray Train's own elastic policy counts what nodes have in all, whoever holds it and whatever their
labels; a placement group counts what is free where the processes may go.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group

from radio.config import Config
from radio.errors import RadioError
from radio.targets.stream import device_of
from radio.training.run_folder import RunFolder
from radio.training.stop import FILE
from ray_jobs.placement import STILL_WAITING_SECONDS, offers, pool_of, reserved

log = logging.getLogger("ray_jobs")
PLACE_SECONDS = 5.0  # for a group that has room: nodes tell of freed resources now and then
Bundle = tuple[dict[str, float], dict[str, str]]  # resources and labels of one process


def student_bundle(config: Config) -> Bundle:
    """Return what one of the student's processes reserves, and the labels of its node."""
    gpu = {"GPU": 1.0} if device_of(config).type == "cuda" else {}
    return {"CPU": 1.0, **gpu}, dict(config.parallel.labels)


def count_places(config: Config, teachers_run: bool) -> int:
    """Return how many student processes have a place, up to `parallel.workers`.

    Teachers and feeders that do not run yet are counted in; with a cache they may never start.

    Raises:
        RadioError: fewer than `parallel.min_workers` had one in `cluster.give_up_seconds`.
    """
    assert config.parallel.workers is not None, "ray_jobs.train asks"
    most, least = config.parallel.workers, config.parallel.min_workers or config.parallel.workers
    others = [] if teachers_run or config.cache is not None else list(_others(config))
    started = said_at = time.monotonic()
    while not fits([*others, *[student_bundle(config)] * least]):
        now = time.monotonic()
        waited = now - started
        said = (
            f"{least} of the student's processes ({_shown(student_bundle(config))} each) have no "
            f"place{' beside the teachers' if others else ''}. The nodes offer {offers()}; lower "
            "parallel.workers or set parallel.min_workers, reserve less for teachers, or add nodes"
        )
        if waited > config.cluster.give_up_seconds:
            raise RadioError(f"not started after {waited:.0f} s: {said}")
        if now - said_at > STILL_WAITING_SECONDS:
            said_at = now
            log.info("waiting (%.0f s): %s", waited, said)
    while most > least:  # bisect
        middle = (most + least + 1) // 2
        if fits([*others, *[student_bundle(config)] * middle]):
            least = middle
        else:
            most = middle - 1
    return least


def fits(bundles: list[Bundle]) -> bool:
    """Return whether all of it has a place at the same time."""
    with asked_for(bundles) as group:
        return bool(group.wait(PLACE_SECONDS))


@contextmanager
def asked_for(bundles: list[Bundle]) -> Iterator[PlacementGroup]:
    """Ask for places inside the block, where an autoscaler sees it, and give them back."""
    labels = [labels for _, labels in bundles]
    group = placement_group(
        [resources for resources, _ in bundles],
        "PACK",
        bundle_label_selector=labels if any(labels) else None,
    )
    try:
        yield group
    finally:
        remove_placement_group(group)


class Growth:
    """Inside the block: ends the student's processes, once, when another one finds a place.

    They then save and stop as by hand (out/.stop), and whoever started them starts more. The place
    is kept until the end of the block. It is asked for when they train, as the teachers have theirs
    then; with all of `parallel.workers` never.
    """

    def __init__(self, config: Config, count: int, run: RunFolder) -> None:
        self.config, self.run = config, run
        self.wanted = count != config.parallel.workers
        self.found = False
        self._before = run.newest()
        self._held = ExitStack()
        self._ready: Any = None

    def __enter__(self) -> Growth:
        return self

    def look(self) -> None:
        """See whether there is a place now."""
        if not self.wanted or self.found:
            return
        if self._ready is None:
            if self.run.newest() != self._before:
                self._ready = self._held.enter_context(
                    asked_for([student_bundle(self.config)])
                ).ready()
        elif ray.wait([self._ready], timeout=0)[0]:
            log.info("there is a place for another student process; starting them again")
            self.found = True
            (self.run.path / FILE).touch()

    def __exit__(self, *raised: object) -> None:
        self._held.close()
        if self.found:
            (self.run.path / FILE).unlink(missing_ok=True)


def _others(config: Config) -> Iterator[Bundle]:
    for name in config.teachers:
        pool, resources = pool_of(config, name), reserved(config, name)
        if resources:
            for _ in range(pool.replicas or config.cluster.replicas):
                yield resources, dict(pool.labels)
    for _ in range(config.cluster.feeders):
        yield {"CPU": 1.0}, {}


def _shown(bundle: Bundle) -> str:
    resources, labels = bundle
    shown = ", ".join(f"{amount:g} {what}" for what, amount in resources.items())
    return f"{shown} on a node labelled {labels}" if labels else shown
