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

import json
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from radio.extraction.plan import Row
from radio.files import printable, save_tensors, sha256_of, whole, write_whole

OWN = {"manifest.json", "plan.parquet", "data"}
SHARD_FILE = re.compile(r"(\.tmp-\d+-)?\d{5,}\.(parquet|patches\.safetensors|done\.json)")
# Of a merged picture: [K] patches per token, and [T] each patch's token (T = grid_h grid_w).
MERGED: Mapping[str, type[np.generic]] = {"sizes": np.float32, "assignment": np.int64}


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

    def fail_unless_finite(self) -> None:
        """Turn into a failed row when a feature is NaN or more than float16 can hold."""
        wrong = [name for name, array in self.features.items() if not np.isfinite(array).all()]
        if wrong:
            self.features.clear()
            self.grid = (0, 0)
            self.error = f"feature '{wrong[0]}' is NaN, or beyond the 65504 that float16 can hold"

    @property
    def num_bytes(self) -> int:
        """Memory that its features take."""
        return sum(array.nbytes for array in self.features.values())


def is_pooled(name: str) -> bool:
    """Tell whether a feature is one vector per picture (a parquet column) or one per patch."""
    return name.rsplit(":", 1)[-1] == "summary"


def write_plan(folder: Path, rows: Sequence[Row], manifest: Mapping[str, Any]) -> None:
    """Write plan.parquet, then manifest.json."""
    columns = {"row": pa.array([row.row for row in rows], pa.int64())}
    columns |= {"key": _text(row.key for row in rows), "uri": _text(row.uri for row in rows)}
    _write_table(folder / "plan.parquet", pa.table(columns))
    write_whole(folder / "manifest.json", json.dumps(manifest, indent=2))


def is_extraction(folder: Path) -> bool:
    """Tell whether a folder holds what this module writes, and nothing else."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        names = {path.name for path in folder.iterdir()}
        shards = [path.name for path in (folder / "data").iterdir()]
    except (OSError, ValueError):
        return False
    is_ours = isinstance(manifest, dict) and {"schema", "fingerprint", "rows"} <= set(manifest)
    return is_ours and names <= OWN and all(SHARD_FILE.fullmatch(name) for name in shards)


def write_shard(
    data: Path,
    number: int,
    items: Sequence[Encoded],
    dims: Mapping[str, int],
    fingerprint: str,
    is_merged: bool = False,
) -> int:
    """Write one shard's files, `done.json` last, and return how many rows are fine.

    Args:
        data: the folder of shards.
        number: of the shard.
        items: its rows, failed ones too.
        dims: channels of every feature asked for, by name.
        fingerprint: of the encoder and how it was used.
        is_merged: whether patches were merged, so that `sizes` and `assignment` belong to a row.
    """
    started = time.perf_counter()
    ok = sum(item.error is None for item in items)
    written = [f"{number:05d}.parquet"]
    _write_table(data / written[0], _table(items, dims))
    dense = {name: width for name, width in dims.items() if not is_pooled(name)}
    if dense:
        written.append(f"{number:05d}.patches.safetensors")
        patches = _patches(items, dense, MERGED if is_merged else {})
        with whole(data / written[1]) as temporary:
            save_tensors({k: torch.from_numpy(v) for k, v in patches.items()}, temporary)
    facts = {
        "rows": len(items),
        "ok": ok,
        "failed": len(items) - ok,
        "fingerprint": fingerprint,
        "seconds": time.perf_counter() - started,
        "sha256": {name: sha256_of(data / name) for name in written},
    }
    write_whole(data / f"{number:05d}.done.json", json.dumps(facts, indent=2))
    return ok


def _table(items: Sequence[Encoded], dims: Mapping[str, int]) -> pa.Table:
    columns: dict[str, Any] = {
        "row": pa.array([item.row.row for item in items], pa.int64()),
        "key": _text(item.row.key for item in items),
        "uri": _text(item.row.uri for item in items),
        "sha256": _text(item.sha256 for item in items),
        "H": pa.array([item.height for item in items], pa.int32()),
        "W": pa.array([item.width for item in items], pa.int32()),
        "grid_h": pa.array([item.grid[0] for item in items], pa.int32()),
        "grid_w": pa.array([item.grid[1] for item in items], pa.int32()),
        "status": _text("ok" if item.error is None else "failed" for item in items),
        "error": _text(item.error for item in items),
    }
    for name in filter(is_pooled, dims):
        values = [item.features.get(name) for item in items]
        columns[name] = pa.array(values, pa.list_(pa.float16(), dims[name]))
    return pa.table(columns)


def _text(values: Iterable[str | None]) -> pa.Array:
    """Return a column of text; bytes of file names that are no UTF-8 become `\\xff`."""
    return pa.array([None if v is None else printable(v) for v in values], pa.string())


def _patches(
    items: Sequence[Encoded], dims: Mapping[str, int], flat: Mapping[str, type[np.generic]]
) -> dict[str, np.ndarray]:
    """Return each feature's tokens of all rows one after the other, and where each row's end."""
    fine = [item.features for item in items if item.error is None]
    lengths = [len(item.features[next(iter(dims))]) if item.features else 0 for item in items]
    tensors = {"offsets": np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)}
    for name, width in dims.items():
        empty = np.zeros((0, width), np.float16)
        tensors[name] = np.concatenate([empty, *(features[name] for features in fine)])
    for name, dtype in flat.items():
        tensors[name] = np.concatenate([np.zeros(0, dtype), *(features[name] for features in fine)])
    return tensors


def _write_table(path: Path, table: pa.Table) -> None:
    with whole(path) as temporary:
        pq.write_table(table, temporary)
