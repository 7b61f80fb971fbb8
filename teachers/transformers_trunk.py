"""Reading one trunk's weights out of a whole model that transformers saved; the rest is dropped."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.hub import cached_file

from teachers.weights import load_state, local_file, require_hub

HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


def trunk_state(
    name: str, pretrained: str, prefixes: Sequence[str], releases: Sequence[str]
) -> dict[str, Tensor]:
    """Return the weights below the first of `prefixes` that the checkpoint knows, in trunk names.

    `pretrained` is a file, a folder or a hub name as `save_pretrained` lays it out
    (`model.safetensors`, or an index and its shards); without any of the prefixes it is taken for
    the trunk alone. Raises ValueError for an unknown name, an unreadable file, or a download when
    offline.
    """
    state: dict[str, Tensor] = {}
    for path in _files(name, pretrained, releases):
        state |= load_state(path)
    for prefix in prefixes:
        found = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
        if found:
            return found
    return state


def _files(name: str, pretrained: str, releases: Sequence[str]) -> list[Path]:
    path = local_file(name, pretrained)
    if path is not None:
        return [path]
    folder = Path(pretrained).expanduser()
    if folder.is_dir():
        place = str(folder)
    elif HUB_NAME.fullmatch(pretrained):
        require_hub(name, pretrained, f"model.safetensors of '{pretrained}'")
        place = pretrained
    else:
        raise ValueError(
            f"teacher '{name}': there are no weights '{pretrained}'; tags: {', '.join(releases)}; "
            "another hub name (owner/model) or the path of a local folder or file may be given"
        )
    try:
        return _shards(place)
    except OSError as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"teacher '{name}': the weights of '{pretrained}' cannot be had ({reason}); expected "
            f"{SAFE_WEIGHTS_NAME} or {SAFE_WEIGHTS_INDEX_NAME} with all its shards"
        ) from error


def _shards(place: str) -> list[Path]:
    try:
        return [_file(place, SAFE_WEIGHTS_NAME)]
    except OSError:
        # A sharded model has an index instead; a place that has neither raises again here.
        index = json.loads(_file(place, SAFE_WEIGHTS_INDEX_NAME).read_text())
    return [_file(place, shard) for shard in sorted(set(index["weight_map"].values()))]


def _file(place: str, file: str) -> Path:
    found = cached_file(place, file)
    assert found is not None  # cached_file raises OSError for what is not there
    return Path(found)
