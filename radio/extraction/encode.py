"""Features of pictures into parquet: one row per planned picture, failed ones too."""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import UInt8
from torch import Tensor

from radio import __version__
from radio.data.decode import decode
from radio.encoder.encoder import Encoder
from radio.encoder.images import Size, check_size, pair, resized
from radio.errors import RadioError
from radio.extraction.plan import Row, plan_rows
from radio.extraction.shard_files import (
    MERGED,
    Encoded,
    is_extraction,
    write_plan,
    write_shard,
)
from radio.files import printable
from radio.progress import Report, told

log = logging.getLogger("radio.encode")
BLOCK_BATCHES = 4  # of pictures that are read before the model runs on those of one size
DECODERS = 2  # threads that read and resize while the model works
NAMED = 20  # failed pictures in the log
SHARD_ROWS = 10_000
SHARD_BYTES = 512 << 20  # features held in memory before a shard is closed


@dataclass(frozen=True)
class EncodeResult:
    """What was written: counts of rows, shards, and the seconds it took."""

    out: str
    rows: int
    ok: int
    failed: int
    shards: int
    seconds: float


@dataclass(frozen=True)
class Work:
    """How every picture is treated."""

    encoder: Encoder
    features: tuple[str, ...]
    size: Size | None
    merge_to: int | None
    batch: int

    def as_dict(self) -> dict[str, Any]:
        """Return what decides the stored numbers, for JSON."""
        return {
            "features": list(self.features),
            "size": None if self.size is None else list(pair(self.size)),
            "merge_to": self.merge_to,
            "dtype": "float16",
            "preprocess": "upright RGB, one bicubic pass with antialias, pixels in [0, 1]",
        }

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the encoder's weights and `as_dict`."""
        text = self.encoder.fingerprint + json.dumps(self.as_dict(), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


EncodeRows = Callable[[Sequence[Row], Work], Iterator[Encoded]]  # every row, in order


def encode(
    sources: str | Path | Sequence[str | Path],
    out: str | Path,
    encoder: Encoder,
    features: Sequence[str] = ("summary",),
    size: Size | None = None,
    merge_to: int | None = None,
    batch: int = 16,
    overwrite: bool = False,
    shard_rows: int = SHARD_ROWS,
    shard_bytes: int = SHARD_BYTES,
    progress: Report | None = None,
    encode_rows: EncodeRows | None = None,
) -> EncodeResult:
    """Encode every picture of `sources` into `out`; a damaged one becomes a row with its reason.

    Args:
        sources: folders, globs, picture files, WebDataset tars, brace patterns of these.
        out: folder to write.
        encoder: from `radio.load`.
        features: names of `encoder.feature_names`; stored as float16.
        size: side or (height, width) in px; without it each goes to its nearest multiple of the
            patch.
        merge_to: merge patch features to this many tokens.
        batch: pictures of one size per forward.
        overwrite: replace an earlier extraction in `out`.
        shard_rows: rows of a shard at most.
        shard_bytes: a shard is closed when its features have reached this many bytes.
        progress: told (done, total) after every picture.
        encode_rows: where the rows are encoded; in this process if not given.

    Raises:
        RadioError: no pictures, an unknown feature name, a size that does not fit the patch, or
            `out` holds something already.
    """
    started = time.perf_counter()
    names = (features,) if isinstance(features, str) else tuple(features)
    work = Work(encoder, names, size, merge_to, batch)
    encoder.check_request(names, merge_to)
    counts = {"batch": batch, "shard_rows": shard_rows, "shard_bytes": shard_bytes}
    for name, count in counts.items():
        if count < 1:
            raise RadioError(f"{name} is {count}; at least 1 is needed")
    if size is not None:
        check_size(*pair(size), encoder.patch_size)
    several = [sources] if isinstance(sources, str | Path) else sources
    rows = plan_rows([str(source) for source in several])
    folder = _empty_folder(Path(out), overwrite)
    fingerprint = work.fingerprint
    write_plan(folder, rows, _manifest(work, fingerprint, len(rows)))
    dims = {name: encoder.feature_dims[name] for name in work.features}
    ok = shards = 0
    items_of = told(_named((encode_rows or encoded)(rows, work)), len(rows), progress)
    for items in _shards(items_of, shard_rows, shard_bytes):
        ok += write_shard(folder / "data", shards, items, dims, fingerprint, merge_to is not None)
        shards += 1
    seconds = time.perf_counter() - started
    return EncodeResult(str(out), len(rows), ok, len(rows) - ok, shards, seconds)


def _empty_folder(folder: Path, overwrite: bool) -> Path:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        if not is_extraction(folder):
            raise RadioError(f"{folder} already holds something else; choose another output folder")
        if not overwrite:
            raise RadioError(
                f"{folder} already holds an extraction; choose another output folder, or replace "
                "it with overwrite=True (--overwrite)"
            )
        shutil.rmtree(folder)
    (folder / "data").mkdir(parents=True, exist_ok=True)
    return folder


def _manifest(work: Work, fingerprint: str, num_rows: int) -> dict[str, Any]:
    versions = {"radio-distill": __version__, "torch": str(torch.__version__)}
    return {
        "schema": 1,
        "fingerprint": fingerprint,
        "rows": num_rows,
        **work.as_dict(),
        "versions": versions,
    }


def _named(items: Iterator[Encoded]) -> Iterator[Encoded]:
    """Pass rows on, with a word in the log on the first that failed."""
    failed = 0
    for item in items:
        failed += item.error is not None
        if item.error is not None and failed <= NAMED:
            more = "; further ones are named in the column `error` only" * (failed == NAMED)
            log.warning("%s failed: %s%s", printable(item.row.uri), item.error, more)
        yield item


def _shards(items: Iterator[Encoded], max_rows: int, max_bytes: int) -> Iterator[list[Encoded]]:
    """Cut a run of rows where a shard is full; what it depends on does not change between runs."""
    shard: list[Encoded] = []
    num_bytes = 0
    for item in items:
        shard.append(item)
        num_bytes += item.num_bytes
        if len(shard) == max_rows or num_bytes >= max_bytes:
            yield shard
            shard, num_bytes = [], 0
    if shard:
        yield shard


@dataclass
class _Waiting:
    """A picture on its way to the model; no pixels: it failed, or the model is done with it."""

    item: Encoded
    pixels: UInt8[Tensor, "3 h w"] | None


def block_of(work: Work) -> int:
    """Return how many rows are encoded together, whatever lies before and behind them."""
    return BLOCK_BATCHES * work.batch


def encoded(rows: Sequence[Row], work: Work) -> Iterator[Encoded]:
    """Yield rows in order; inside a block, pictures of one size run together."""
    prepared = _prepared(rows, work)
    while block := list(itertools.islice(prepared, block_of(work))):
        _forward_all(block, work)
        yield from (waiting.item for waiting in block)


def _forward_all(block: Sequence[_Waiting], work: Work) -> None:
    """Run the model on the pictures of a block, those of one size in batches."""
    by_shape: dict[torch.Size, list[_Waiting]] = {}
    for waiting in block:
        if waiting.pixels is not None:
            by_shape.setdefault(waiting.pixels.shape, []).append(waiting)
    for alike in by_shape.values():
        for start in range(0, len(alike), work.batch):
            _forward(alike[start : start + work.batch], work)


def _forward(group: Sequence[_Waiting], work: Work) -> None:
    pixels = torch.stack([waiting.pixels for waiting in group if waiting.pixels is not None])
    outputs = work.encoder.encode(pixels, work.features, merge_to=work.merge_to, batch=work.batch)
    grid = work.encoder.grid((pixels.shape[-2], pixels.shape[-1]))
    for name, values in outputs.items():
        arrays = (values if name in MERGED else values.half()).cpu().numpy()
        for waiting, array in zip(group, arrays, strict=True):
            waiting.item.features[name] = array
    for waiting in group:
        waiting.item.grid = grid
        waiting.item.fail_unless_finite()
        waiting.pixels = None


def _prepared(rows: Sequence[Row], work: Work) -> Iterator[_Waiting]:
    """Read and resize a little ahead of the model, in order."""
    ahead: deque[Future[_Waiting]] = deque()
    with ThreadPoolExecutor(DECODERS) as pool:
        for row in rows:
            ahead.append(pool.submit(_prepare, row, work))
            if len(ahead) >= 2 * work.batch:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()


def _prepare(row: Row, work: Work) -> _Waiting:
    item = Encoded(row)
    try:
        data = row.source.read(row.index)
        item.sha256 = hashlib.sha256(data).hexdigest()
        image = decode(data)
        item.height, item.width = image.height, image.width
        return _Waiting(item, resized(image, work.encoder.patch_size, work.size))
    except (RadioError, OSError) as error:  # this row fails, its neighbours do not
        item.error = str(error)
        return _Waiting(item, None)
