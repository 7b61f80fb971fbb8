"""Several nodes, made on one machine: teachers where their labels say, and nodes that are lost."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster
from test_distill import losses_of
from test_ray_pools import Disturbed
from test_ray_students import assert_close, shared, started, wait_for
from tiny import tiny_config

from radio.config import ClusterConfig, Config, PoolConfig
from radio.errors import RadioError
from radio.training.checkpoint import newest_checkpoint
from radio.training.distill import distill
from ray_jobs.cluster import cluster
from ray_jobs.feature_stream import RayStream

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("no_report")]
STORE = 128 << 20


@pytest.fixture(scope="module")
def nodes() -> Iterator[Cluster]:
    """A head for the student, and a node for teachers."""
    head = {"num_cpus": 2, "object_store_memory": STORE, "include_dashboard": False}
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RAY_ADDRESS", raising=False)
        made = Cluster(initialize_head=True, head_node_args=head)
        add_teachers(made)
        with cluster(ClusterConfig(address=made.address)):
            yield made
        made.shutdown()


def add_teachers(made: Cluster) -> Any:
    return made.add_node(num_cpus=4, object_store_memory=STORE, labels={"role": "teacher"})


def spread(root: Path, steps: int = 8) -> Config:
    config = tiny_config(root, steps=steps)
    labels = {"role": "teacher"}
    config.cluster.pools = {name: PoolConfig(labels=labels) for name in config.teachers}
    return config


def test_teachers_live_where_their_labels_say(nodes: Cluster, tmp_path: Path) -> None:
    local = distill(tiny_config(tmp_path / "local", steps=4)).out
    config = spread(tmp_path / "nodes", steps=4)
    (home,) = (n["NodeID"] for n in ray.nodes() if n["Labels"].get("role") == "teacher")
    with RayStream(config) as stream:
        for pool in stream.pools.values():
            (replica,) = pool.replicas
            assert ray.get(replica.handle.node.remote()) == home
        distill(config, stream)
    assert losses_of(config.out) == losses_of(local)


def test_a_lost_node_costs_no_step(nodes: Cluster, tmp_path: Path) -> None:
    local = distill(tiny_config(tmp_path / "local", steps=8)).out
    config = spread(tmp_path / "nodes")

    def lose(stream: RayStream) -> None:
        worker = next(node for node in nodes.list_all_nodes() if node is not nodes.head_node)
        nodes.remove_node(worker, allow_graceful=False)
        add_teachers(nodes)

    with Disturbed(config, {2: lose}) as stream:
        distill(config, stream)
        assert stream.retries >= len(config.teachers)
    assert losses_of(config.out) == losses_of(local)


def test_labels_that_no_node_has(nodes: Cluster, tmp_path: Path) -> None:
    config = spread(tmp_path)
    config.cluster.give_up_seconds = 5.0
    config.cluster.pools["words"] = PoolConfig(labels={"role": "poet"})
    with pytest.raises(RadioError, match=r"'words' \(1 CPU on a node labelled \{'role': 'poet'\}"):
        RayStream(config)


def test_workers_become_more_when_a_node_joins(tmp_path: Path) -> None:
    """A cluster of its own: the run is a process, which is told to stop and start by itself."""
    config = shared(tmp_path, "grown", steps=400)
    config.parallel.min_workers = 1
    config.parallel.labels = {"role": "student"}
    config.checkpoint.every_steps = 20
    head = {"num_cpus": 4, "object_store_memory": STORE, "include_dashboard": False}
    made = Cluster(initialize_head=True, head_node_args=head)
    try:
        made.add_node(num_cpus=1, object_store_memory=STORE, labels={"role": "student"})
        config.cluster.address = made.address
        process = started(config, tmp_path)
        checkpoints = Path(config.out) / "checkpoints"
        wait_for(lambda: newest_checkpoint(checkpoints) is not None or process.poll() is not None)
        made.add_node(num_cpus=1, object_store_memory=STORE, labels={"role": "student"})
        printed, _ = process.communicate(timeout=400)
        assert process.returncode == 0, printed[-4000:]
    finally:
        made.shutdown()
    assert len(list((Path(config.out) / "ray_train").glob("start-*"))) == 2
    expected = distill(shared(tmp_path, "alone", steps=400, workers=None)).out
    # Rounding begins at 1e-7 with the second worker and grows tenfold in 50 steps, to some 1e-4.
    assert_close(Path(config.out), expected, steps=100)
    assert_close(Path(config.out), expected, rel=1e-3)
