"""Where a run's workers go: what each reserves, which nodes may hold it, and what is short."""

from __future__ import annotations

import logging
import os
import time
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


def replicas_of(config: Config, name: str) -> tuple[list[Any], PlacementGroup | None]:
    """Start the replicas of a teacher, and their placement group where they have one."""
    wanted = pool_of(config, name)
    resources = reserved(config, name)
    options: dict[str, Any] = {
        "num_cpus": resources.get("CPU", 0),
        "num_gpus": resources.get("GPU", 0),
        "memory": resources.get("memory", 0),
        "runtime_env": _threads(config.threads.teacher),
    }
    group = None
    if wanted.strategy is not None:
        count = wanted.replicas or config.cluster.replicas
        labels = [wanted.labels] * count if wanted.labels else None
        group = placement_group([resources] * count, wanted.strategy, bundle_label_selector=labels)
        options["scheduling_strategy"] = PlacementGroupSchedulingStrategy(group)
    elif wanted.labels:
        options["label_selector"] = wanted.labels
    start = _starter(TeacherActor, options)
    count = wanted.replicas or config.cluster.replicas
    return [start(config, name, os.getcwd()) for _ in range(count)], group


def feeders_of(config: Config) -> list[Any]:
    """Start the feeders."""
    start = _starter(Feeder, {"num_cpus": 1, "runtime_env": _threads(1)})
    return [start(config, os.getcwd()) for _ in range(config.cluster.feeders)]


def _starter(kind: type, options: Mapping[str, Any]) -> Callable[..., Any]:
    # The pool asks again itself, so that losses are seen.
    remote: Any = ray.remote(kind).options(max_restarts=-1, max_task_retries=0, **options)
    start: Callable[..., Any] = remote.remote
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
    refs = {
        handle.ready.remote(sources): name
        for name, handles in starting.items()
        for handle in handles
    }
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
        waited = time.monotonic() - started
        if refs and (waited > config.cluster.give_up_seconds or not done):
            missing = {name: list(refs.values()).count(name) for name in refs.values()}
            short = shortage(config, missing, {n: len(h) for n, h in starting.items()})
            if waited > config.cluster.give_up_seconds:
                raise RadioError(f"not started after {waited:.0f} s: {short}")
            log.info("waiting (%.0f s): %s", waited, short)
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
        f"{'; '.join(parts)}. The nodes offer {_offers()}; reserve less (cluster.pools.NAME.cpus, "
        "gpus), lower replicas, or add nodes"
    )


def _offers() -> str:
    free = ray.available_resources()
    total = ray.cluster_resources()
    shown = [
        f"{free.get(what, 0):g} of {amount:g} {what}"
        for what, amount in sorted(total.items())
        if what in ("CPU", "GPU")
    ]
    return ", ".join(shown) + " free"
