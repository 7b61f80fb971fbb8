"""examples/cluster: commands that our programs take, on nodes that their manifests offer."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from radio.config import load

EXAMPLES = Path(__file__).parents[1] / "examples" / "cluster"


def rayjob() -> dict[str, Any]:
    return dict(yaml.safe_load((EXAMPLES / "rayjob.yaml").read_text()))


def test_the_rayjob_trains_on_nodes_that_it_asks_for() -> None:
    spec = rayjob()["spec"]
    words = shlex.split(spec["entrypoint"])
    assert words[:2] == ["radio", "train"]
    config = load(words[2:])
    cluster = spec["rayClusterSpec"]
    groups = {group["groupName"]: group for group in cluster["workerGroupSpecs"]}
    assert config.parallel.workers == groups["student"]["replicas"]
    assert config.parallel.min_workers == groups["student"]["minReplicas"]
    assert config.parallel.labels == groups["student"]["labels"]
    assert set(config.cluster.pools) == set(config.teachers)
    labels = groups["teacher"]["labels"]
    pools = config.cluster.pools.values()
    assert all(pool.labels.items() <= labels.items() for pool in pools)
    gpus = sum((pool.gpus or 0) * (pool.replicas or config.cluster.replicas) for pool in pools)
    assert gpus <= groups["teacher"]["replicas"]  # one each
    assert config.cluster.address == "auto" and config.device == "cuda"
    for group in (cluster["headGroupSpec"], *groups.values()):
        (container,) = group["template"]["spec"]["containers"]
        mounted = {each["mountPath"] for each in container["volumeMounts"]}
        assert "/shared" in mounted and config.out.startswith("/shared/")


@pytest.mark.skipif("RADIO_KUBERAY_CRD" not in os.environ, reason="RADIO_KUBERAY_CRD is not set")
def test_the_rayjob_is_what_kuberay_s_schema_asks() -> None:
    """The variable names ray.io_rayjobs.yaml of a KubeRay release; unknown keys are refused."""
    crd = yaml.safe_load(Path(os.environ["RADIO_KUBERAY_CRD"]).read_text())
    schema = crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
    refuse_unknown(schema)
    schema["properties"]["metadata"] = {"type": "object"}
    jsonschema.Draft7Validator(schema).validate(rayjob())


def refuse_unknown(node: Any) -> None:
    """Make a Kubernetes schema as strict as the API server's own validation."""
    if isinstance(node, dict):
        if node.get("x-kubernetes-int-or-string"):
            node.pop("type", None)
        if "properties" in node and not node.get("x-kubernetes-preserve-unknown-fields"):
            node.setdefault("additionalProperties", False)
    for each in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
        refuse_unknown(each)


def test_the_slurm_script_trains_with_what_its_head_says() -> None:
    script = (EXAMPLES / "slurm.sh").read_text()
    subprocess.run(["bash", "-n", str(EXAMPLES / "slurm.sh")], check=True)
    (said,) = re.findall(r"^#   sbatch slurm\.sh (.+)$", script, re.MULTILINE)
    (own,) = re.findall(r"radio train (stream=ray .+) \"\$@\"", script)
    words = shlex.split(own.replace("$head", "node1").replace("$port", "20001"))
    config = load([*shlex.split(said), *words])
    assert config.stream == "ray" and config.cluster.address == "node1:20001"
