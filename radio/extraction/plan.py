"""Which pictures an extraction reads, as one ordered list of rows."""

from __future__ import annotations

import glob
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from radio.data.shards import ImageSource, open_images
from radio.data.tar_index import EXTENSIONS
from radio.errors import RadioError


@dataclass(frozen=True)
class Row:
    """One planned picture: its number, key, where it lies, and how to read it."""

    row: int
    key: str
    uri: str
    source: ImageSource
    index: int


@dataclass(frozen=True)
class _Files:
    """Single picture files, named as they were given."""

    paths: tuple[str, ...]
    fingerprint: str = ""

    def __len__(self) -> int:
        return len(self.paths)

    def key(self, index: int) -> str:
        return str(Path(self.paths[index]).with_suffix(""))

    def read(self, index: int) -> bytes:
        return Path(self.paths[index]).read_bytes()


def plan_rows(sources: Sequence[str]) -> list[Row]:
    """Return every picture of folders, globs, single files and WebDataset tars, in order.

    Raises:
        RadioError: a source that does not exist or holds no picture.
    """
    opened = [found for source in sources for found in _open(source)]
    rows: list[Row] = []
    for uri, source in opened:
        for index in range(len(source)):
            rows.append(Row(len(rows), source.key(index), uri, source, index))
    if not rows:
        raise RadioError(f"no pictures in {', '.join(sources)}")
    return rows


def _open(source: str) -> Iterator[tuple[str, ImageSource]]:
    is_glob = any(sign in source for sign in "*?[") and "://" not in source
    paths = sorted(glob.glob(source)) if is_glob else [source]
    if not paths:
        raise RadioError(f"{source} matches nothing")
    files = [path for path in paths if Path(path).suffix.lower()[1:] in EXTENSIONS]
    if files:
        missing = [path for path in files if not Path(path).exists()]
        if missing:
            raise RadioError(f"{missing[0]} does not exist")
        yield source, _Files(tuple(files))
    rest = [path for path in paths if path not in files]
    if rest:
        yield source, open_images(rest if len(rest) > 1 else rest[0])
