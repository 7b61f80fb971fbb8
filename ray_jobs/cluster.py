"""Join a Ray cluster, or make one of this machine for the length of a run."""

from __future__ import annotations

import atexit
import importlib
import json
import logging
import os
import secrets
import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import ray

from radio.config import ClusterConfig
from radio.errors import RadioError

log = logging.getLogger("ray_jobs")
PACKAGES = ("radio", "teachers", "student", "ray_jobs")
KNOCK_SECONDS = 10.0
# After a connection broke Ray waits for the reason, by default for a second, before it says that a
# call is lost; we ask again whatever the reason.
SETTINGS = {"RAY_timeout_ms_task_wait_for_death_info": "100"}
AUTHENTICATION = "ray._private.authentication"


@contextmanager
def cluster(config: ClusterConfig) -> Iterator[None]:
    """Be connected to Ray inside the block; a local cluster is stopped after it.

    `address: null` joins the cluster that RAY_ADDRESS names, as inside `ray job submit`; without
    that, or with `address: local`, it makes one with `cpus` logical CPUs (real threads come from
    `threads`, so that four teachers fit on two cores). Another address joins a running one.

    The nodes of a running cluster are sent our four packages; what those need must be there.

    Raises:
        RadioError: nothing answers at the address, or another version of Ray.
    """
    if ray.is_initialized():  # whoever connected this process also disconnects it
        yield
        return
    for key, value in SETTINGS.items():
        os.environ.setdefault(key, value)
    address = config.address or os.environ.get("RAY_ADDRESS") or "local"
    if address == "local":
        _start_local(config)
    else:
        _join(address, "RAY_ADDRESS" if config.address is None else "cluster.address")
    try:
        yield
    finally:
        ray.shutdown()


def _start_local(config: ClusterConfig) -> None:
    if not {"RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & os.environ.keys():
        os.environ["RAY_AUTH_TOKEN_PATH"] = _own_token()
        # The mode is read when Ray is imported, so it cannot be set here to keep this one quiet.
        logging.getLogger(f"{AUTHENTICATION}.authentication_token_setup").setLevel(logging.ERROR)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    ray.init(
        address="local",
        num_cpus=config.cpus,
        include_dashboard=False,
        object_store_memory=config.object_store_mb << 20,
        _node_ip_address="127.0.0.1",
        logging_level=logging.WARNING,
        log_to_driver=False,
    )


def _own_token() -> str:
    """Write a token that lives as long as this process.

    Ray turns token authentication on for local clusters and would write ~/.ray/auth_token; a
    token of our own leaves the user's home and other clusters alone.
    """
    folder = Path(tempfile.mkdtemp(prefix="radio-ray-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    token = folder / "token"
    token.touch(mode=0o600)
    token.write_text(secrets.token_hex(32))
    return str(token)


def _join(address: str, key: str) -> None:
    try:
        _knock(address)
        ray.init(
            address=address,
            runtime_env=_packages(),
            logging_level=logging.WARNING,
            log_to_driver=False,
        )
    except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        if "ersion mismatch" in str(error):
            said = " ".join(str(error).split())
            raise RadioError(
                f"the cluster at {key}={address} runs another Ray or Python than this process: "
                f"{said}; install the cluster's versions here, or start it with these"
            ) from error
        raise RadioError(
            f"no Ray cluster answers at {key}={address} ({error}); start one with "
            "`ray start --head`, or use cluster.address=local for one of this machine"
        ) from error


def _packages() -> dict[str, Any]:
    """Return a runtime environment that brings our packages and SETTINGS to a job's processes.

    A job's own environment stands: it has been told which code to bring.
    """
    job = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")).get("runtime_env", {})
    if {"working_dir", "py_modules", "pip", "uv", "conda", "image_uri"} & job.keys():
        return {}
    modules = [importlib.import_module(name) for name in PACKAGES]
    paths = [str(Path(str(module.__file__)).parent) for module in modules]
    return {"py_modules": paths, "env_vars": SETTINGS}


def _knock(address: str) -> None:
    """Open and close a connection: Ray itself tries a silent address for minutes."""
    place = urlsplit(address if "://" in address else f"//{address}")
    if place.hostname is not None and place.port is not None:  # "auto" names no place
        socket.create_connection((place.hostname, place.port), KNOCK_SECONDS).close()
