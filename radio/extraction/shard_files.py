"""The files of an extraction: what a shard holds, written whole or not at all.

OUT/manifest.json            what was encoded, by what, how
OUT/plan.parquet             row, key, uri
OUT/data/00000.parquet       row, key, uri, sha256, H, W, grid_h, grid_w, status, error,
                             <summary> FixedSizeList<halffloat>[D]
OUT/data/00000.patches.safetensors   <features> [sum of tokens, D] f16, offsets int64 [rows + 1]
                                     (and sizes, assignment where tokens were merged)
OUT/data/00000.done.json     rows, ok, failed, sha256 per file; written last
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from safetensors.numpy import save_file

from radio.extraction.plan import Row

MERGED = ("sizes", "assignment")  # of a merged picture: [K] pixels per token, [T] each patch's


@dataclass
class Encoded:
    """One planned picture after its turn: features, or the reason why there are none.

    `height` and `width` are the picture's own pixels, `grid` the tokens' rows and columns.
    """

    row: Row
    sha256: str | None = None
    height: int = 0
    width: int = 0
    grid: tuple[int, int] = (0, 0)
    error: str | None = None
    features: dict[str, np.ndarray] = field(default_factory=dict)

    @property
    def num_bytes(self) -> int:
        """Memory that its features take."""
        return sum(array.nbytes for array in self.features.values())


def is_pooled(name: str) -> bool:
    """Tell whether a feature is one vector per picture (a parquet column) or one per patch."""
    return name.rsplit(":", 1)[-1] == "summary"


def write_plan(folder: Path, rows: Sequence[Row], manifest: Mapping[str, Any]) -> None:
    """Write plan.parquet, then manifest.json."""
    columns = {"row": [row.row for row in rows], "key": [row.key for row in rows]}
    table = pa.table({**columns, "uri": [row.uri for row in rows]})
    _write_table(folder / "plan.parquet", table)
    _commit(folder / "manifest.json", json.dumps(manifest, indent=2).encode())


def write_shard(
    data: Path,
    number: int,
    items: Sequence[Encoded],
    dims: Mapping[str, int],
    fingerprint: str,
) -> int:
    """Write one shard's files, `done.json` last, and return how many rows are fine.

    Args:
        data: the folder of shards.
        number: of the shard.
        items: its rows, failed ones too.
        dims: channels of every feature asked for, by name.
        fingerprint: of the encoder and how it was used.
    """
    started = time.perf_counter()
    ok = sum(item.error is None for item in items)
    written = [f"{number:05d}.parquet"]
    _write_table(data / written[0], _table(items, dims))
    dense = [name for name in dims if not is_pooled(name)]
    if dense:
        written.append(f"{number:05d}.patches.safetensors")
        temporary = _temporary(data / written[1])
        save_file(_patches(items, {name: dims[name] for name in dense}), temporary)
        _rename(temporary, data / written[1])
    facts = {
        "rows": len(items),
        "ok": ok,
        "failed": len(items) - ok,
        "fingerprint": fingerprint,
        "seconds": time.perf_counter() - started,
        "sha256": {name: _sha256(data / name) for name in written},
    }
    _commit(data / f"{number:05d}.done.json", json.dumps(facts, indent=2).encode())
    return ok


def _table(items: Sequence[Encoded], dims: Mapping[str, int]) -> pa.Table:
    columns: dict[str, Any] = {
        "row": pa.array([item.row.row for item in items], pa.int64()),
        "key": pa.array([item.row.key for item in items], pa.string()),
        "uri": pa.array([item.row.uri for item in items], pa.string()),
        "sha256": pa.array([item.sha256 for item in items], pa.string()),
        "H": pa.array([item.height for item in items], pa.int32()),
        "W": pa.array([item.width for item in items], pa.int32()),
        "grid_h": pa.array([item.grid[0] for item in items], pa.int32()),
        "grid_w": pa.array([item.grid[1] for item in items], pa.int32()),
        "status": ["ok" if item.error is None else "failed" for item in items],
        "error": pa.array([item.error for item in items], pa.string()),
    }
    for name in filter(is_pooled, dims):
        values = [item.features.get(name) for item in items]
        columns[name] = pa.array(values, pa.list_(pa.float16(), dims[name]))
    return pa.table(columns)


def _patches(items: Sequence[Encoded], dims: Mapping[str, int]) -> dict[str, np.ndarray]:
    """Return each feature's tokens of all rows one after the other, and where each row's end."""
    fine = [item.features for item in items if item.error is None]
    lengths = [len(item.features[next(iter(dims))]) if item.features else 0 for item in items]
    tensors = {"offsets": np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)}
    for name, width in dims.items():
        empty = np.zeros((0, width), np.float16)
        tensors[name] = np.concatenate([empty, *(features[name] for features in fine)])
    for name in MERGED:
        if fine and name in fine[0]:
            tensors[name] = np.concatenate([features[name] for features in fine])
    return tensors


def _write_table(path: Path, table: pa.Table) -> None:
    pq.write_table(table, _temporary(path))
    _rename(_temporary(path), path)


def _commit(path: Path, data: bytes) -> None:
    _temporary(path).write_bytes(data)
    _rename(_temporary(path), path)


def _temporary(path: Path) -> Path:
    return path.with_name(f".tmp-{path.name}")


def _rename(temporary: Path, final: Path) -> None:
    """Make the bytes safe on disk, then give them their name."""
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    temporary.replace(final)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
