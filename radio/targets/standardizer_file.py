"""The file of fitted standardizers: one safetensors file, kinds and metadata in its header."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple, NoReturn

from safetensors import SafetensorError, safe_open
from torch import Tensor

from radio.errors import RadioError
from radio.files import save_tensors

HEADER = "radio.standardizers"
States = dict[str, dict[str, Tensor]]  # by teacher, then by entry
ENTRIES = ("count", "mean", "matrix", "inverse")


class Header(NamedTuple):
    """What a file says of itself: the kind by teacher, and the writer's metadata."""

    kinds: dict[str, str]
    metadata: dict[str, str]


def write_file(
    path: Path,
    kinds: Mapping[str, str],
    states: Mapping[str, Mapping[str, Tensor]],
    metadata: Mapping[str, str],
) -> None:
    """Write states by teacher; the same content gives the same bytes."""
    # Cloned, since safetensors refuses tensors that share memory.
    tensors = {
        f"{name}.{entry}": states[name][entry].clone() for name in kinds for entry in ENTRIES
    }
    # safetensors writes several header entries in an order of its own, a single one always alike.
    header = {"kinds": dict(kinds), "metadata": dict(metadata)}
    save_tensors(tensors, path, metadata={HEADER: json.dumps(header, sort_keys=True)})


def read_file(path: Path) -> tuple[dict[str, str], States]:
    """Return the kind and the state of every teacher.

    Raises:
        RadioError: the file is missing, cut or something else; names it and the way out.
    """
    kinds = read_header(path).kinds
    try:
        with safe_open(path, "pt") as file:
            # Cloned, since the file is mapped into memory and may be replaced later.
            states = {
                name: {entry: file.get_tensor(f"{name}.{entry}").clone() for entry in ENTRIES}
                for name in kinds
            }
    except (OSError, SafetensorError) as error:
        _refuse(path, error)
    return kinds, states


def read_header(path: Path) -> Header:
    """Return a file's header.

    Raises:
        RadioError: the file is missing, cut or something else; names it and the way out.
    """
    if not path.exists():
        raise RadioError(f"there is no standardizer file {path}; run: radio fit")
    try:
        with safe_open(path, "pt") as file:
            header = json.loads((file.metadata() or {})[HEADER])
        return Header(dict(header["kinds"]), dict(header["metadata"]))
    except KeyError:
        raise RadioError(
            f"{path} holds something else than standardizers; give the file that radio fit wrote, "
            "or run: radio fit"
        ) from None
    except (OSError, SafetensorError) as error:
        _refuse(path, error)


def _refuse(path: Path, error: Exception) -> NoReturn:
    raise RadioError(
        f"{path} is not a whole standardizer file ({error}); delete it and run: radio fit"
    ) from error
