"""Where a run's workers go: what each reserves, which nodes may hold it, and what is short."""

from __future__ import annotations

import logging
import os
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from radio.config import Config, PoolConfig
from radio.errors import RadioError
from radio.targets.stream import device_of
from ray_jobs.actors import Feeder, TeacherActor

log = logging.getLogger("ray_jobs")
STILL_WAITING_SECONDS = 15.0


def replicas_of(config: Config, name: str) -> tuple[list[Any], list[PlacementGroup]]:
    """Start the replicas of a teacher, and the placement groups that keep their places.

    Each has a place of its own, or all have one group with the pool's `strategy`.

    Raises:
        RadioError: a strategy for what reserves nothing.
    """
    wanted, resources = pool_of(config, name), reserved(config, name)
    count = wanted.replicas or config.cluster.replicas
    if wanted.strategy is not None and not resources:
        raise RadioError(
            f"cluster.pools.{name} reserves nothing, and a placement group ({wanted.strategy}) "
            "places what is reserved; give it cpus, gpus or memory_mb, or no strategy"
        )
    start = _starter(TeacherActor, resources, wanted.labels, config.threads.teacher)
    places = _places(resources, wanted.labels, count, wanted.strategy)
    return [start(place, config, name, os.getcwd()) for place in places], _groups(places)


def feeders_of(config: Config) -> tuple[list[Any], list[PlacementGroup]]:
    """Start the feeders, and the placement groups that keep their places."""
    resources = {"CPU": 1.0}
    start = _starter(Feeder, resources, {}, 1)
    places = _places(resources, {}, config.cluster.feeders, None)
    return [start(place, config, os.getcwd()) for place in places], _groups(places)


Place = tuple[PlacementGroup, int] | None  # a group, and the number of a bundle in it


def _places(
    resources: dict[str, float], labels: Mapping[str, str], count: int, strategy: str | None
) -> list[Place]:
    """Reserve what replicas need; kept while one is started anew, so that nobody takes its place.

    What reserves nothing needs no place.
    """
    if not resources:
        return [None] * count

    def group(size: int, strategy: str) -> PlacementGroup:
        selectors = [dict(labels)] * size if labels else None
        made: PlacementGroup = placement_group(
            [resources] * size, strategy, bundle_label_selector=selectors
        )
        return made

    if strategy is None:
        return [(group(1, "PACK"), 0) for _ in range(count)]
    together = group(count, strategy)
    return [(together, number) for number in range(count)]


def _groups(places: Sequence[Place]) -> list[PlacementGroup]:
    return list({place[0].id: place[0] for place in places if place is not None}.values())


def _starter(
    kind: type, resources: Mapping[str, float], labels: Mapping[str, str], threads: int
) -> Callable[..., Any]:
    """Return what starts a worker at a place."""

    def start(place: Place, *arguments: Any) -> Any:
        options: dict[str, Any] = {}
        if place is not None:
            options["scheduling_strategy"] = PlacementGroupSchedulingStrategy(*place)
        elif labels:
            options["label_selector"] = dict(labels)
        remote: Any = ray.remote(kind).options(
            num_cpus=resources.get("CPU", 0),
            num_gpus=resources.get("GPU", 0),
            memory=resources.get("memory", 0),
            runtime_env=_threads(threads),
            max_restarts=-1,
            max_task_retries=0,  # the pool asks again itself, so that losses are seen
            enable_task_events=False,  # else the memory of Ray's head grows with every call
            **options,
        )
        return remote.remote(*arguments)

    return start


def _threads(count: int) -> dict[str, Any]:
    return {"env_vars": {"OMP_NUM_THREADS": str(count)}}


def pool_of(config: Config, name: str) -> PoolConfig:
    """Return what `cluster.pools` says of a teacher."""
    return config.cluster.pools.get(name, PoolConfig())


def reserved(config: Config, name: str) -> dict[str, float]:
    """Return what one replica of a teacher reserves, in Ray's names; memory in bytes."""
    wanted = pool_of(config, name)
    gpus = wanted.gpus
    if gpus is None:
        gpus = 1.0 if device_of(config).type == "cuda" else 0.0
    memory = float((wanted.memory_mb or 0) << 20)
    found = {"CPU": wanted.cpus, "GPU": gpus, "memory": memory}
    return {name: amount for name, amount in found.items() if amount}


def wait_until_ready(
    config: Config, starting: Mapping[str, Sequence[Any]], sources: list[Any]
) -> dict[str, Any]:
    """Return what `ready` of each kind of worker says, saying whom we wait for.

    Raises:
        RadioError: a worker cannot be built, or got no place in `cluster.give_up_seconds`; says
            what was asked, what the nodes offer and what would fit.
    """
    handles = [(name, handle) for name, each in starting.items() for handle in each]
    unplaced = {handle.__ray_ready__.remote(): name for name, handle in handles}
    refs = {handle.ready.remote(sources): name for name, handle in handles}
    log.info("starting in Ray actors: %s", ", ".join(starting))
    said: dict[str, Any] = {}
    started = time.monotonic()
    while refs:
        done, _ = ray.wait(list(refs), timeout=STILL_WAITING_SECONDS)
        for ref in done:
            name = refs.pop(ref)
            found = _said(name, ref)
            if said.setdefault(name, found) != found:
                raise RadioError(
                    f"'{name}' has other weights or options on another node; give every node the "
                    "same files"
                )
        for ref in ray.wait(list(unplaced), num_returns=len(unplaced), timeout=0)[0]:
            del unplaced[ref]
        waited = time.monotonic() - started
        if refs and (waited > config.cluster.give_up_seconds or not done):
            asked = {name: len(each) for name, each in starting.items()}
            late = _late(config, asked, Counter(unplaced.values()), Counter(refs.values()))
            if waited > config.cluster.give_up_seconds:
                raise RadioError(f"not started after {waited:.0f} s: {late}")
            log.info("waiting (%.0f s): %s", waited, late)
    return said


def _said(name: str, ref: Any) -> Any:
    try:
        return ray.get(ref)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, RadioError):
            raise error.cause from None
        raise
    except ray.exceptions.RayActorError as error:
        if "No module named" in str(error):
            raise RadioError(
                f"'{name}' cannot start on a node that lacks our packages or what they need: "
                f"{_line_with(str(error), 'No module named')}; install radio-distill on every node"
            ) from error
        raise RadioError(
            f"'{name}' died while it started ({type(error).__name__}); is its node out of memory? "
            f"See the Ray logs\n{str(error).strip()[:500]}"
        ) from error


def _late(
    config: Config, asked: Mapping[str, int], unplaced: Counter[str], unready: Counter[str]
) -> str:
    """Say for whom there is no place, and else who has one and is building itself."""
    if unplaced:
        return shortage(config, unplaced, asked)
    loading = (f"{count} of {asked[name]} of '{name}'" for name, count in unready.items())
    return f"loading, each in its place: {', '.join(loading)}"


def _line_with(text: str, part: str) -> str:
    return next(line.strip() for line in text.splitlines() if part in line)


def shortage(config: Config, missing: Mapping[str, int], asked: Mapping[str, int]) -> str:
    """Say which workers have no place, what one reserves, what nodes offer and what would fit."""
    parts = []
    for name, count in missing.items():
        if name not in config.teachers:
            parts.append(f"{count} of {asked[name]} {name} (1 CPU each)")
            continue
        wants = ", ".join(f"{amount:g} {what}" for what, amount in reserved(config, name).items())
        labels = pool_of(config, name).labels
        on = f" on a node labelled {dict(labels)}" if labels else ""
        placed = asked[name] - count
        fits = (
            f"; {placed} fit: +cluster.pools={{{name}: {{replicas: {placed}}}}}" if placed else ""
        )
        parts.append(f"{count} of {asked[name]} replicas of teacher '{name}' ({wants}{on}){fits}")
    return (
        f"{'; '.join(parts)}. The nodes offer {offers()}; reserve less (cluster.pools.NAME.cpus, "
        "gpus), lower replicas, or add nodes"
    )


def offers() -> str:
    """Return what is free on the cluster's nodes, and what they have."""
    free = ray.available_resources()
    total = ray.cluster_resources()
    shown = [
        f"{free.get(what, 0):g} of {amount:g} {what}"
        for what, amount in sorted(total.items())
        if what in ("CPU", "GPU")
    ]
    return ", ".join(shown) + " free"
