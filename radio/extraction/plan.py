"""Which pictures an extraction reads, as one ordered list of rows."""

from __future__ import annotations

import glob
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import braceexpand

from radio.data.shards import ImageSource, open_images, place_of
from radio.data.storage import is_url
from radio.data.tar_index import EXTENSIONS
from radio.errors import RadioError


@dataclass(frozen=True)
class Row:
    """One planned picture: its number, key, where it lies, and how to read it.

    `uri` is the file, for a picture in a shard also the byte at which it starts.
    """

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

    Of the files that a glob matches, pictures and tars count; of a folder, all below it.

    Raises:
        RadioError: a source that does not exist or holds no picture.
    """
    rows: list[Row] = []
    for source in (found for given in sources for found in _open(given)):
        for index in range(len(source)):
            rows.append(Row(len(rows), source.key(index), _uri(source, index), source, index))
    if not rows:
        raise RadioError(f"no pictures in {', '.join(sources) or 'an empty list of sources'}")
    return rows


def _uri(source: ImageSource, index: int) -> str:
    return source.paths[index] if isinstance(source, _Files) else place_of(source, index)


def _open(given: str) -> Iterator[ImageSource]:
    """Open what one source names: its folders, then its single pictures, then its tars."""
    paths = _matches(given)
    files = [path for path in paths if _is_picture(path)]
    folders = [path for path in paths if Path(path).is_dir()]
    known = {*files, *folders}
    tars = [path for path in paths if path not in known]
    yield from map(open_images, folders)
    if files:
        yield _Files(tuple(files))
    if tars:
        yield open_images(tars)


def _matches(given: str) -> list[str]:
    """Return the paths that a source names: one as it is, or those of a brace pattern or glob.

    A single name is left to `open_images`, which says what is wrong with it.
    """
    if is_url(given) or Path(given).exists():
        return [given]  # a file's name may hold braces or brackets of its own
    try:
        named = list(braceexpand.braceexpand(given))
    except ValueError as error:
        raise RadioError(f"the braces of '{given}' do not close") from error
    paths: list[str] = []
    for name in named:
        wild = any(sign in name for sign in "*?[")
        paths += _glob(name) if wild else [name]
    if not paths:
        raise RadioError(f"{given} matches no picture, tar or folder")
    missing = [path for path in paths if not Path(path).exists()]
    if missing and (paths != [given] or _is_picture(given)):
        count = f"{len(missing)} of {len(paths)} are missing: " if len(paths) > 1 else ""
        raise RadioError(f"{count}{missing[0]} does not exist")
    return paths


def _glob(pattern: str) -> list[str]:
    """Return what counts among the matches; what lies below a matched folder comes with it."""
    found = [path for path in sorted(glob.glob(pattern, recursive=True)) if _is_wanted(path)]
    folders = {Path(path) for path in found if Path(path).is_dir()}
    return [path for path in found if folders.isdisjoint(Path(path).parents)]


def _is_picture(path: str) -> bool:
    is_local_file = not is_url(path) and not Path(path).is_dir()
    return is_local_file and Path(path).suffix.lower()[1:] in EXTENSIONS


def _is_wanted(path: str) -> bool:
    return _is_picture(path) or path.lower().endswith(".tar") or Path(path).is_dir()
