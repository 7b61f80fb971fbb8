"""Workers: who gets which work, and what becomes of it when replicas, feeders and hours are bad."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import closing, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
from test_distill import losses_of
from tiny import fake_teacher, tiny_config

from radio.config import ClusterConfig, Config, PoolConfig, StageConfig
from radio.data.configured import training_plan
from radio.data.plan import StepSpec
from radio.errors import RadioError
from radio.targets.cache import open_stream
from radio.targets.fit import fit
from radio.targets.stream import StepBatch
from radio.targets.target_maker import CodedTarget, Request
from radio.training.distill import distill
from ray_jobs import placement
from ray_jobs.cluster import cluster
from ray_jobs.feature_stream import RayStream
from ray_jobs.placement import reserved, wait_until_ready
from ray_jobs.pool import LEAST_HEDGE_SECONDS, USUAL_OF, Pool, answer, rest
from ray_jobs.replica import LOST, MOST_DEATHS
from ray_jobs.window import Window, most_steps

pytestmark = pytest.mark.usefixtures("no_report")


@pytest.fixture(scope="module")
def running() -> Iterator[None]:
    with cluster(ClusterConfig(cpus=12, object_store_mb=256)):
        yield


@pytest.fixture(scope="module")
def local_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return distill(tiny_config(tmp_path_factory.mktemp("local"), steps=8)).out


class Echo:
    """A worker that says what it was told, and can be slow, mistaken or dead."""

    def __init__(self) -> None:
        self.calls = 0

    def ready(self) -> str:
        return "ready"

    def pid(self) -> int:
        return os.getpid()

    def say(self, value: int, seconds: float = 0.0) -> tuple[int, int]:
        self.calls += 1
        time.sleep(seconds)
        return value, os.getpid()

    def mistake(self) -> None:
        raise RadioError("a mistake of the user's")

    def die(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.fixture
def pool(running: None) -> Iterator[Pool]:
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers lack this module
    remote = ray.remote(Echo).options(num_cpus=0.1, max_restarts=-1, max_task_retries=0)
    pool = Pool("an echo", [remote.remote() for _ in range(2)], 60, 120, hedge=2, expected="ready")
    pids_of(pool)
    yield pool
    pool.close()


def pids_of(pool: Pool) -> list[int]:
    return [ray.get(each.handle.pid.remote()) for each in pool.replicas]


def saying(value: int, seconds: float = 0.0) -> Any:
    return lambda handle, first: handle.say.remote(value, seconds)


def test_work_goes_to_the_one_that_has_least_of_it(pool: Pool) -> None:
    slow = pool.ask(saying(0, 2.0), "a test")
    quick = [pool.ask(saying(value), "a test") for value in (1, 2)]
    answers = [answer(pool, ask) for ask in (*quick, slow)]
    assert [value for value, _ in answers] == [1, 2, 0]
    (_, first), (_, second), (_, busy) = answers
    assert first != busy  # the second call found one replica busy, one free
    assert {first, second, busy} == set(pids_of(pool))
    assert pool.in_flight == 0 and pool.retries == 0


def test_a_killed_replica_costs_no_work_and_serves_again(pool: Pool) -> None:
    pids = pids_of(pool)
    asks = [pool.ask(saying(value, 0.3), "a test") for value in range(6)]
    os.kill(pids[0], signal.SIGKILL)
    assert [answer(pool, ask)[0] for ask in asks] == list(range(6))
    assert pool.retries == 1  # the other five were not sent yet, or answered
    deadline = time.monotonic() + 60
    while any(each.coming_back is not None for each in pool.replicas):
        assert time.monotonic() < deadline
        pool.watch()
        time.sleep(0.1)
    assert len(set(pids_of(pool)) - set(pids)) == 1


def test_a_slow_answer_is_asked_for_twice(pool: Pool) -> None:
    for _ in range(USUAL_OF):
        pool.took(0.01)
    os.kill(pids_of(pool)[0], signal.SIGSTOP)
    began = time.monotonic()
    asks = [pool.ask(saying(value), "a test") for value in range(2)]
    assert [answer(pool, ask)[0] for ask in asks] == [0, 1]
    assert time.monotonic() - began < 10  # not the timeout's 60 s
    assert pool.hedges == 1 and pool.retries == 0
    assert [answer(pool, pool.ask(saying(value), "a test"))[0] for value in (2, 3)] == [2, 3]


def test_one_that_is_busy_is_asked_for_what_a_silent_one_has(pool: Pool) -> None:
    for _ in range(USUAL_OF):
        pool.took(0.3)
    stopped = pids_of(pool)[0]
    os.kill(stopped, signal.SIGSTOP)
    began = time.monotonic()
    asks = deque(pool.ask(saying(value, 0.3), "a test") for value in range(3))
    for value in range(10):  # whoever is well always has something to do
        while not pool.poll(asks[0]):
            for ask in list(asks)[1:]:
                pool.poll(ask, is_next=False)
            rest([(pool, asks[0])])
            pool.watch()
        assert asks.popleft().value[0] == value
        if value + 3 < 10:
            asks.append(pool.ask(saying(value + 3, 0.3), "a test"))
    assert time.monotonic() - began < 10 and pool.retries == 0
    assert pool.hedges == 1  # what it had when it was found out; it was given nothing more
    os.kill(stopped, signal.SIGCONT)


def test_a_replica_that_hangs_is_started_anew(pool: Pool) -> None:
    pool.hedge = None
    for replica in pool.replicas:
        replica.call_timeout = 1.0
    pids = pids_of(pool)
    os.kill(pids[0], signal.SIGSTOP)
    assert answer(pool, pool.ask(saying(5), "a test"))[0] == 5
    assert pool.retries == 1 and pool.replicas[0].deaths == 1


def test_a_mistake_arrives_as_itself_and_is_not_tried_again(pool: Pool) -> None:
    ask = pool.ask(lambda handle, first: handle.mistake.remote(), "a test")
    with pytest.raises(RadioError, match=r"^a mistake of the user's$"):
        answer(pool, ask)
    assert pool.retries == 0


@pytest.mark.slow
def test_what_kills_every_replica_is_given_up(pool: Pool) -> None:
    ask = pool.ask(lambda handle, first: handle.die.remote(), "step 7")
    with pytest.raises(RadioError, match=r"an echo did not answer step 7 .*2 of 2 replicas"):
        answer(pool, ask)
    assert pool.retries == 2 * (MOST_DEATHS + 1)


@pytest.mark.slow
def test_another_teacher_on_another_node_is_refused(pool: Pool) -> None:
    for replica in pool.replicas:
        replica.expected = "something else"
    os.kill(pids_of(pool)[0], signal.SIGKILL)
    with pytest.raises(RadioError, match="an echo has other weights or options on another node"):
        for value in range(1000):
            answer(pool, pool.ask(saying(value, 0.05), "a test"))


class Disturbed(RayStream):
    """Does something to the processes after some steps of the training."""

    def __init__(self, config: Config, deeds: dict[int, Any]) -> None:
        super().__init__(config)
        self.deeds = deeds

    def read(
        self, specs: Iterable[StepSpec], request: Request, incarnation: int = 0
    ) -> Iterator[StepBatch]:
        for batch in super().read(specs, request, incarnation):
            yield batch
            if request.codec != "float32" and batch.step in self.deeds:
                self.deeds[batch.step](self)


def kill(handle: Any, how: int = signal.SIGKILL) -> None:
    """Send a signal to a worker's process, once it has one."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        with suppress(*LOST):
            os.kill(ray.get(handle.pid.remote(), timeout=30), how)
            return
        time.sleep(0.1)
    raise AssertionError("the worker did not come back")


@pytest.mark.slow
def test_a_feeder_that_is_asked_in_one_way(running: None, tmp_path: Path) -> None:
    """Where student and teachers see the same pixels, one reading serves all."""
    config = tiny_config(tmp_path, steps=2)
    config.teachers = {"parts": fake_teacher(6, 7, 16)}
    for partition in config.stages[0].partitions.values():
        partition.views = {"parts": "match"}
    local = distill(replace(config, out=str(tmp_path / "local"))).out
    config.cluster.feeders = 1
    with RayStream(config) as stream:
        distill(config, stream)
        assert stream.fed > 0
    assert losses_of(config.out) == losses_of(local)


@pytest.mark.slow
def test_feeders_give_the_same_bits_and_may_die(
    running: None, local_run: Path, tmp_path: Path
) -> None:
    config = tiny_config(tmp_path, steps=8)
    config.cluster.feeders = 2
    deeds = {1: lambda stream: kill(stream.feeders.replicas[0].handle)}
    deeds[3] = lambda stream: [kill(each.handle) for each in stream.feeders.replicas]
    with Disturbed(config, deeds) as stream:
        distill(config, stream)
        assert stream.fed > 4  # more than the first steps' views came from a feeder
    assert losses_of(config.out) == losses_of(local_run)


class Counted(RayStream):
    """Counts the readings that feeders are asked for, by step."""

    def _feed(self, spec: StepSpec, request: Request) -> dict[Any, Any]:
        fed = super()._feed(spec, request)
        if request.standardizers and request.split == "train":
            self.asked = [*getattr(self, "asked", []), len(fed)]
        return fed


@pytest.mark.slow
def test_feeders_with_a_cache_give_the_same_bits(running: None, tmp_path: Path) -> None:
    """The second epoch is read from the folder, and asks nothing of a feeder."""
    config = tiny_config(tmp_path, steps=6, pictures=21)  # an epoch is three steps
    config.data.repeat_epochs = 1
    local = distill(replace(config, out=str(tmp_path / "local"))).out
    config.cluster.feeders, config.cache = 1, str(tmp_path / "cache")
    streams: list[Counted] = []

    def live() -> RayStream:
        streams.append(Counted(config))
        return streams[0]

    with closing(open_stream(config, live)) as stream:
        distill(config, stream)
    first, second = streams[0].asked[:3], streams[0].asked[3:]
    assert min(first) > 0 and second == [0, 0, 0]
    assert losses_of(config.out) == losses_of(local)


@pytest.mark.slow
def test_replicas_killed_and_stopped_at_once_change_no_bit(
    running: None, local_run: Path, tmp_path: Path
) -> None:
    config = tiny_config(tmp_path, steps=8)
    config.cluster.pools = {
        "parts": PoolConfig(replicas=2, cpus=0.5),
        "words": PoolConfig(cpus=0.5),
    }
    config.cluster.call_timeout_seconds = 5.0
    deeds = {
        1: lambda stream: kill(stream.pools["parts"].replicas[1].handle, signal.SIGSTOP),
        3: lambda stream: [kill(pool.replicas[0].handle) for pool in stream.pools.values()],
        5: lambda stream: kill(stream.pools["words"].replicas[0].handle, signal.SIGSTOP),
    }
    with Disturbed(config, deeds) as stream:
        distill(config, stream)
        assert len(stream.pools["parts"].replicas) == 2
        assert stream.retries >= 4
    assert losses_of(config.out) == losses_of(local_run)


@pytest.mark.slow
def test_a_silent_replica_is_found_out_while_the_student_works(
    running: None, tmp_path: Path
) -> None:
    config = tiny_config(tmp_path, steps=USUAL_OF + 8)
    config.cluster.replicas = 2
    hedges: list[int] = []

    def work(stream: RayStream) -> None:
        before = stream.pools["parts"].hedges
        time.sleep(4 * LEAST_HEDGE_SECONDS)
        hedges.append(stream.pools["parts"].hedges - before)

    stopped = USUAL_OF + 1
    deeds = {
        stopped: lambda stream: kill(stream.pools["parts"].replicas[0].handle, signal.SIGSTOP),
        stopped + 2: work,
    }
    with Disturbed(config, deeds) as stream:
        distill(config, stream)
    assert hedges == [1]


def test_teachers_sleep_where_a_stage_does_not_use_them(running: None, tmp_path: Path) -> None:
    config = tiny_config(tmp_path, steps=2)
    first = config.stages[0]
    alone = {
        name: replace(part, views={"words": "native"}) for name, part in first.partitions.items()
    }
    config.stages.append(StageConfig(2, alone))
    with RayStream(config) as stream:
        plan = training_plan(config, len(stream.sources["train"]))
        request = Request("train", "bf16", fit(config, stream))
        sleepers = stream.pools["parts"].replicas[0].handle
        for spec, _ in stream.encode([plan(step) for step in range(4)], request):
            if spec.step == 3:
                assert not ray.get(sleepers.awake.remote())
        assert ray.get(stream.pools["words"].replicas[0].handle.awake.remote())
        [(_, coded)] = stream.encode([plan(0)], request)  # a call wakes it
        assert "parts" in coded[0] and ray.get(sleepers.awake.remote())


@pytest.mark.slow
def test_what_has_no_place_says_what_would_fit(running: None, tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    config.cluster.give_up_seconds = 30.0
    config.cluster.pools = {"words": PoolConfig(replicas=2, cpus=7.0)}
    with pytest.raises(RadioError) as caught:
        RayStream(config)
    said = str(caught.value)
    assert "1 of 2 replicas of teacher 'words' (7 CPU)" in said
    assert "1 fit: +cluster.pools={words: {replicas: 1}}" in said and "of 12 CPU free" in said
    config.cluster.pools = {"edges": PoolConfig(gpus=1.0, labels={"role": "teacher"})}
    with pytest.raises(RadioError, match=r"'edges' \(1 CPU, 1 GPU on a node labelled .*'teacher'"):
        RayStream(config)


class Loading:
    """A teacher of large weights on a slow disk."""

    def ready(self, sources: list[Any]) -> None:
        time.sleep(60)


@pytest.mark.slow
def test_what_has_a_place_and_loads_is_said_so(
    running: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(tmp_path)
    config.cluster.give_up_seconds = 8.0
    monkeypatch.setattr(placement, "STILL_WAITING_SECONDS", 2.0)
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    handles = [ray.remote(Loading).options(num_cpus=0.1).remote()]
    with pytest.raises(RadioError, match=r"not started after .*loading, .*: 1 of 1 of 'words'"):
        wait_until_ready(config, {"words": handles}, [])
    ray.kill(handles[0])


@pytest.mark.slow
def test_a_placement_group_and_its_end(running: None, tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    config.cluster.pools = {"words": PoolConfig(replicas=2, strategy="STRICT_PACK")}
    wait_for_cpus(12)  # of what earlier tests have ended
    with RayStream(config) as stream:
        assert ray.available_resources()["CPU"] <= 12 - 4
        assert stream.teachers["words"].feature_dim == 8
    wait_for_cpus(12)


def test_a_placement_group_of_nothing_is_refused(running: None, tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    config.cluster.pools = {"words": PoolConfig(cpus=0.0, strategy="PACK")}
    with pytest.raises(RadioError, match=r"pools\.words reserves nothing.*\(PACK\)"):
        RayStream(config)


def wait_for_cpus(count: float) -> None:
    deadline = time.monotonic() + 60
    while ray.available_resources().get("CPU") != count:
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_what_a_replica_reserves(tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    assert reserved(config, "words") == {"CPU": 1.0}
    config.cluster.pools = {"words": PoolConfig(cpus=0.0, gpus=0.25, memory_mb=2)}
    assert reserved(config, "words") == {"GPU": 0.25, "memory": 2 << 20}


def target(num_bytes: int) -> CodedTarget:
    return CodedTarget(None, np.zeros(num_bytes, np.uint8), np.zeros(0, bool), (), {}, 0.0)


def test_the_window_holds_no_more_than_the_store() -> None:
    window = Window(4, room=1000.0)
    assert window.steps() == 1  # nothing is known yet
    window.saw({"a": {0: target(100)}, "b": {0: target(50), 1: target(50)}}, 0)
    assert window.steps() == 4
    window.saw({"a": {0: target(200)}, "b": {1: target(100)}}, 1)
    assert window.steps() == 2  # and one that the student works on
    assert window.steps(others=1) == window.steps(others=5) == 1
    window.saw({"a": {0: target(10)}}, 2)
    assert window.steps() == 2  # a large step may come again
    with pytest.raises(RadioError, match=r"step 3 take 0 MB .*teacher 'b'.*object_store_mb"):
        window.saw({"a": {0: target(1)}, "b": {0: target(1000)}}, 3)


def test_a_window_has_a_step_for_each_replica_and_one_to_spare() -> None:
    assert [most_steps(None, replicas) for replicas in (1, 2, 5)] == [2, 3, 6]
    assert [most_steps(None, 5, ranks) for ranks in (2, 5, 8)] == [4, 2, 2]
    assert most_steps(1, 5, 2) == 1


def test_a_teacher_s_precision_and_micro_batch_are_its_own(tmp_path: Path) -> None:
    from radio.targets.stream import LocalStream

    config = tiny_config(tmp_path)
    config.teachers["words"] = replace(fake_teacher(12, 8, 32), precision="bf16", micro_batch=2)
    plan = training_plan(config, 24)
    with LocalStream(config) as stream:
        maker = stream.makers["words"]
        assert (maker.micro_batch, stream.makers["parts"].micro_batch) == (2, 3)
        [(_, half)] = stream.encode([plan(0)], Request("train", "float32", {}))
    with LocalStream(tiny_config(tmp_path)) as stream:
        [(_, full)] = stream.encode([plan(0)], Request("train", "float32", {}))
    difference = np.abs(half[0]["words"].features - full[0]["words"].features).max()
    assert 0 < difference < 0.05 * np.abs(full[0]["words"].features).max()
    assert np.array_equal(half[0]["parts"].features, full[0]["parts"].features)
