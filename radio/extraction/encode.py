"""Features of pictures into parquet: one row per planned picture, failed ones too.

OUT/manifest.json            what was encoded, by what, how
OUT/plan.parquet             row, key, uri
OUT/data/00000.parquet       row, key, uri, sha256, H, W, grid_h, grid_w, status, error,
                             <summary> FixedSizeList<halffloat>[D]
OUT/data/00000.patches.safetensors   <features> [sum of tokens, D] f16, offsets [rows + 1]
OUT/data/00000.done.json     rows, ok, failed, sha256 per file; written last
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from jaxtyping import UInt8
from safetensors.numpy import save_file
from torch import Tensor

from radio import __version__
from radio.data.decode import decode
from radio.encoder.encoder import Encoder, Size
from radio.errors import RadioError
from radio.extraction.plan import Row, plan_rows

DECODERS = 2  # threads that read and resize while the model works


@dataclass(frozen=True)
class EncodeResult:
    """What was written: counts of rows, shards, and the seconds it took."""

    out: str
    rows: int
    ok: int
    failed: int
    shards: int
    seconds: float


@dataclass
class Prepared:
    """A picture on its way: pixels or the reason why there are none, then its features."""

    row: Row
    sha256: str | None
    height: int
    width: int
    pixels: UInt8[Tensor, "3 h w"] | None
    error: str | None
    features: dict[str, np.ndarray]


def encode(
    sources: str | Sequence[str],
    out: str | Path,
    encoder: Encoder,
    features: Sequence[str] = ("summary",),
    size: Size | None = None,
    merge_to: int | None = None,
    batch: int = 16,
    shard_rows: int = 10_000,
    overwrite: bool = False,
) -> EncodeResult:
    """Encode every picture of `sources` into `out`; a damaged one becomes a row with its reason.

    Args:
        sources: folders, globs, picture files, WebDataset tars.
        out: folder to write.
        encoder: from `radio.load`.
        features: names of `encoder.feature_names`; stored as float16.
        size: side or (height, width); without it each goes to its nearest multiple of the patch.
        merge_to: merge patch features to this many tokens.
        batch: pictures of one size per forward.
        shard_rows: rows per parquet file.
        overwrite: replace an earlier extraction in `out`.

    Raises:
        RadioError: no pictures, an unknown feature name, or `out` holds something already.
    """
    started = time.perf_counter()
    encoder.check_names(features)
    rows = plan_rows([sources] if isinstance(sources, str) else sources)
    folder = _empty_folder(Path(out), overwrite)
    how = {"features": list(features), "size": size, "merge_to": merge_to, "dtype": "float16"}
    fingerprint = _fingerprint(encoder, how)
    _write_plan(folder, rows, how, fingerprint)
    ok = 0
    shards = range(0, len(rows), shard_rows)
    with ThreadPoolExecutor(DECODERS) as pool:
        for number, first in enumerate(shards):
            part = rows[first : first + shard_rows]
            prepared = _prepare_all(pool, part, encoder, size, 2 * batch)
            done = _encode_all(encoder, prepared, features, merge_to, batch)
            ok += _write_shard(folder / "data", number, done, encoder, features, fingerprint)
    seconds = time.perf_counter() - started
    return EncodeResult(str(out), len(rows), ok, len(rows) - ok, len(shards), seconds)


def _empty_folder(folder: Path, overwrite: bool) -> Path:
    if folder.exists() and any(folder.iterdir()):
        ours = (folder / "manifest.json").exists()
        if not (overwrite and ours):
            what = "an extraction" if ours else "other files"
            raise RadioError(f"{folder} already holds {what}; choose another output folder")
        shutil.rmtree(folder)
    (folder / "data").mkdir(parents=True, exist_ok=True)
    return folder


def _fingerprint(encoder: Encoder, how: dict[str, Any]) -> str:
    digest = hashlib.sha256(json.dumps(how, sort_keys=True).encode())
    for key, value in sorted(encoder.state_dict().items()):
        digest.update(key.encode())
        digest.update(value.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _write_plan(folder: Path, rows: list[Row], how: dict[str, Any], fingerprint: str) -> None:
    columns = {"row": [r.row for r in rows], "key": [r.key for r in rows]}
    table = pa.table({**columns, "uri": [row.uri for row in rows]})
    pq.write_table(table, folder / "plan.parquet")
    manifest = {
        "schema": 1,
        "fingerprint": fingerprint,
        "rows": len(rows),
        **how,
        "preprocess": "RGB, bicubic with antialias, pixels in [0, 1]",
        "versions": {"radio-distill": __version__, "torch": str(torch.__version__)},
    }
    _commit(folder / "manifest.json", json.dumps(manifest, indent=2).encode())


def _prepare_all(
    pool: ThreadPoolExecutor, rows: list[Row], encoder: Encoder, size: Size | None, ahead: int
) -> Iterator[Prepared]:
    """Read and resize at most `ahead` pictures before they are needed, in order."""
    waiting = []
    for row in rows:
        waiting.append(pool.submit(_prepare, row, encoder, size))
        if len(waiting) >= ahead:
            yield waiting.pop(0).result()
    for future in waiting:
        yield future.result()


def _prepare(row: Row, encoder: Encoder, size: Size | None) -> Prepared:
    sha256 = None
    try:
        data = row.source.read(row.index)
        sha256 = hashlib.sha256(data).hexdigest()
        image = decode(data)
        pixels = encoder.prepare(image, size)[0]
    except (RadioError, OSError) as error:  # this row fails, its neighbours do not
        return Prepared(row, sha256, 0, 0, None, str(error), {})
    return Prepared(row, sha256, image.height, image.width, pixels, None, {})


def _encode_all(
    encoder: Encoder,
    prepared: Iterator[Prepared],
    features: Sequence[str],
    merge_to: int | None,
    batch: int,
) -> list[Prepared]:
    """Run the model on batches of one size; rows keep their order."""
    done: list[Prepared] = []
    by_size: dict[tuple[int, ...], list[Prepared]] = {}
    for item in prepared:
        done.append(item)
        if item.pixels is None:
            continue
        group = by_size.setdefault(tuple(item.pixels.shape), [])
        group.append(item)
        if len(group) == batch:
            _forward(encoder, group, features, merge_to)
            group.clear()
    for group in by_size.values():
        if group:
            _forward(encoder, group, features, merge_to)
    return done


def _forward(
    encoder: Encoder, group: list[Prepared], features: Sequence[str], merge_to: int | None
) -> None:
    pixels = torch.stack([item.pixels for item in group if item.pixels is not None])
    outputs = encoder.encode(pixels, features, merge_to=merge_to)
    for name, values in outputs.items():
        wide = name in ("sizes", "assignment")
        array = values.cpu().numpy() if wide else values.half().cpu().numpy()
        for item, value in zip(group, array, strict=True):
            item.features[name] = value
    for item in group:
        height, width = item.pixels.shape[-2:] if item.pixels is not None else (0, 0)
        item.features["grid"] = np.array(encoder.grid(height, width))
        item.pixels = None  # the memory of a whole shard's pixels is not needed


def _write_shard(
    data: Path,
    number: int,
    items: list[Prepared],
    encoder: Encoder,
    features: Sequence[str],
    fingerprint: str,
) -> int:
    """Write one shard's files, `done.json` last, and return how many rows are fine."""
    started = time.perf_counter()
    ok = sum(item.error is None for item in items)
    pooled = [name for name in features if name.endswith("summary")]
    dense = [name for name in features if not name.endswith("summary")]
    files = {f"{number:05d}.parquet": _table(items, pooled)}
    for name, table in files.items():
        temporary = data / f".tmp-{name}"
        pq.write_table(table, temporary)
        _rename(temporary, data / name)
    written = list(files)
    if dense:
        name = f"{number:05d}.patches.safetensors"
        save_file(_patches(items, dense), data / f".tmp-{name}")
        _rename(data / f".tmp-{name}", data / name)
        written.append(name)
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


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _table(items: list[Prepared], pooled: Sequence[str]) -> pa.Table:
    grids = [item.features.get("grid", np.zeros(2, dtype=int)) for item in items]
    columns: dict[str, Any] = {
        "row": pa.array([item.row.row for item in items], pa.int64()),
        "key": [item.row.key for item in items],
        "uri": [item.row.uri for item in items],
        "sha256": pa.array([item.sha256 for item in items], pa.string()),
        "H": pa.array([item.height for item in items], pa.int32()),
        "W": pa.array([item.width for item in items], pa.int32()),
        "grid_h": pa.array([int(grid[0]) for grid in grids], pa.int32()),
        "grid_w": pa.array([int(grid[1]) for grid in grids], pa.int32()),
        "status": ["ok" if item.error is None else "failed" for item in items],
        "error": pa.array([item.error for item in items], pa.string()),
    }
    for name in pooled:
        values = [item.features.get(name) for item in items]
        width = next((len(value) for value in values if value is not None), 0)
        kind = pa.list_(pa.float16(), width)
        columns[name] = pa.array(
            [None if value is None else value.astype(np.float16) for value in values], kind
        )
    return pa.table(columns)


def _patches(items: list[Prepared], dense: Sequence[str]) -> dict[str, np.ndarray]:
    """Return `<name>` [sum of tokens, D] and `offsets` [rows + 1] (and `sizes` when merged)."""
    lengths = [len(item.features[dense[0]]) if item.error is None else 0 for item in items]
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    tensors = {"offsets": offsets}
    fine = [item for item in items if item.error is None]
    for name in (*dense, "sizes"):
        values = [item.features[name] for item in fine if name in item.features]
        if values:
            tensors[name] = np.ascontiguousarray(np.concatenate(values))
    return tensors


def _commit(path: Path, data: bytes) -> None:
    temporary = path.with_name(f".tmp-{path.name}")
    temporary.write_bytes(data)
    _rename(temporary, path)


def _rename(temporary: Path, final: Path) -> None:
    """Make the bytes safe on disk, then give them their name."""
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    temporary.replace(final)
