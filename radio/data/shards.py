"""Pictures in folders or WebDataset shards, numbered and read by (shard, offset, length).

The place of each is learnt once, so that step N needs no step N-1.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import braceexpand
import numpy as np
import webdataset
from numpy.typing import NDArray

from radio.data.storage import filesystem, is_url, read_range, storage_errors
from radio.data.tar_index import EXTENSIONS, PackedStrings, TarIndex, index_shards, split_name
from radio.errors import RadioError

log = logging.getLogger("radio.data")


@runtime_checkable
class ImageSource(Protocol):
    """Numbered pictures; picklable, opens its files in each process anew."""

    @property
    def fingerprint(self) -> str:
        """SHA-256 over keys, lengths and shard names, independent of where the files lie."""

    def __len__(self) -> int: ...

    def key(self, index: int) -> str:
        """Return the sample's key."""

    def read(self, index: int) -> bytes:
        """Return the picture's encoded bytes."""


def open_images(
    location: str | os.PathLike[str] | Sequence[str], index_dir: Path | None = None
) -> ImageSource:
    """Open a folder of pictures (or of tars), or WebDataset tars.

    Args:
        location: a folder; or tars by path, brace pattern, glob, s3, gs, hf or http URL, or a
            list of those.
        index_dir: where to keep what was learnt from the tars' headers, for a quick second start.

    Raises:
        RadioError: nothing there, no picture in it, a cut tar, or a key that occurs twice.
    """
    if isinstance(location, os.PathLike):
        location = os.fspath(location)
    if isinstance(location, str) and location and Path(location).is_dir():
        return _open_folder(Path(location), index_dir)
    return ShardSource(index_shards(expand(location), index_dir))


def place_of(source: ImageSource, index: int) -> str:
    """Name the file, and the byte inside its shard, where a sample's picture lies."""
    if isinstance(source, FolderSource | ShardSource):
        return source.place(index)
    return type(source).__name__


class FolderSource:
    """Picture files below a folder, sorted by path; a key is the path without its extension."""

    def __init__(self, root: Path, names: Sequence[str]) -> None:
        self.root = root
        self.names = PackedStrings.pack(names)
        sizes = np.array([(root / name).stat().st_size for name in names], dtype=np.int64)
        self.fingerprint = _fingerprint(self.names, sizes)

    def __len__(self) -> int:
        return len(self.names)

    def key(self, index: int) -> str:
        """Return the file's path below the folder, without its extension."""
        return _without_extension(self.names[index])

    def read(self, index: int) -> bytes:
        """Return the file's bytes."""
        return (self.root / self.names[index]).read_bytes()

    def place(self, index: int) -> str:
        """Return the file's path."""
        return str(self.root / self.names[index])


class ShardSource:
    """Pictures inside tars, read by offset."""

    def __init__(self, index: TarIndex) -> None:
        self.index = index
        names = [shard.rsplit("/", 1)[-1] for shard in index.shards]
        columns = (index.length, index.shard)
        self.fingerprint = _fingerprint(index.keys, *columns, names=names)

    @property
    def num_skipped(self) -> int:
        """Samples of the shards that have no picture."""
        return self.index.num_skipped

    def __len__(self) -> int:
        return len(self.index.keys)

    def key(self, index: int) -> str:
        """Return the sample's key."""
        return self.index.keys[index]

    def read(self, index: int) -> bytes:
        """Return the picture's encoded bytes."""
        shard = self.index.shards[int(self.index.shard[index])]
        return read_range(shard, int(self.index.offset[index]), int(self.index.length[index]))

    def place(self, index: int) -> str:
        """Return the shard and the byte at which the picture starts."""
        shard = self.index.shards[int(self.index.shard[index])]
        return f"{shard} at byte {int(self.index.offset[index])}"


def expand(location: str | Sequence[str]) -> list[str]:
    """Return the shard paths that a pattern (or a list of patterns) names, in order.

    Raises:
        RadioError: no pattern, braces that do not close, or shards that do not exist.
    """
    patterns = [location] if isinstance(location, str) else list(location)
    paths = [path for pattern in patterns for path in _expand_one(pattern)]
    if not paths:
        raise RadioError("no pictures are given; expected a folder or WebDataset tars")
    return paths


def _expand_one(pattern: str) -> list[str]:
    if not pattern:
        raise RadioError("a path of the pictures is empty; expected a folder or WebDataset tars")
    if not is_url(pattern) and Path(pattern).exists():
        return [_not_a_folder(pattern)]  # its name may hold braces or brackets of its own
    try:
        named = list(braceexpand.braceexpand(pattern))
    except ValueError as error:
        raise RadioError(f"the braces of '{pattern}' do not close") from error
    if any(is_url(path) for path in named):
        return [found for path in named for found in _expand_url(path)]
    missing: list[str] = []
    paths: list[str] = []
    for path in named:
        wild = any(sign in path for sign in "*?[")
        found = sorted(glob.glob(path, recursive=True)) if wild else [path]
        there = [_not_a_folder(file) for file in found if Path(file).exists()]
        paths += there
        missing += [] if there else [path]
    if missing:
        raise RadioError(
            f"{_how_many(missing, named)}{missing[0]} does not exist; expected "
            "a folder of pictures, or WebDataset tars such as 'shards/train-{000000..000009}.tar'"
        )
    return paths


def _how_many(missing: Sequence[str], named: Sequence[str]) -> str:
    return f"{len(missing)} of {len(named)} shards are missing: " if len(named) > 1 else ""


def _not_a_folder(path: str) -> str:
    if Path(path).is_dir():
        raise RadioError(f"{path} is a folder; name the tars in it ('{path}/*.tar') instead")
    return path


def _expand_url(url: str) -> list[str]:
    if "*" not in url or url.startswith(("http://", "https://")):
        return [url]  # http has no listing, and its '?' and '*' belong to the address
    fs, inner = filesystem(url)
    try:
        found = sorted(str(fs.unstrip_protocol(path)) for path in fs.glob(inner))
    except storage_errors() as error:
        raise RadioError(f"cannot list {url}: {error}") from error
    if not found:
        raise RadioError(f"{url} matches nothing")
    return found


def _open_folder(folder: Path, index_dir: Path | None) -> ImageSource:
    try:
        files = sorted(_files_of(folder))
        tars = [str(folder / name) for name in files if name.lower().endswith(".tar")]
        names = _pictures(files)
        if tars and names:
            raise RadioError(
                f"{folder} holds tars ({Path(tars[0]).name}) as well as pictures ({names[0]}); "
                f"name the ones you mean, such as '{folder}/*.tar'"
            )
        if tars:
            return ShardSource(index_shards(tars, index_dir))
        if not names:
            seen = f"{len(files)} other files, first {files[0]}" if files else "nothing"
            raise RadioError(
                f"{folder} holds no picture and no tar shard but {seen}; expected "
                f"{', '.join(EXTENSIONS)}"
            )
        return FolderSource(folder, names)
    except OSError as error:
        raise RadioError(f"cannot read {folder}: {error}") from error


def _files_of(root: Path) -> Iterator[str]:
    """Yield the paths below root, through links but never twice, without hidden ones."""
    visited: set[str] = set()
    for folder, folders, names in os.walk(root, followlinks=True, onerror=_raise):
        real = os.path.realpath(folder)
        folders[:] = sorted(name for name in folders if name[0] != "." and real not in visited)
        if real not in visited:
            visited.add(real)
            below = Path(folder).relative_to(root)
            yield from ((below / name).as_posix() for name in names if name[0] != ".")


def _raise(error: OSError) -> None:
    raise error


def _pictures(files: Sequence[str]) -> list[str]:
    """Keep one picture per key, the first of EXTENSIONS, as in a tar."""
    best: dict[str, tuple[int, str]] = {}
    num_left_out = 0
    for name in files:
        extension = name.rsplit(".", 1)[-1].lower()
        if extension not in EXTENSIONS:
            continue
        key, rank = _without_extension(name), EXTENSIONS.index(extension)
        if key in best:
            if best[key][0] == rank:
                raise RadioError(
                    f"{best[key][1]} and {name} have the same key '{key}'; targets are joined by "
                    "key, so give every picture a name of its own"
                )
            num_left_out += 1
        best[key] = min(best.get(key, (rank, name)), (rank, name))
    if num_left_out:
        log.warning(
            "%d pictures were left out, since another of the same name goes before (%s)",
            num_left_out,
            " before ".join(EXTENSIONS),
        )
    return sorted(name for _, name in best.values())


def _without_extension(name: str) -> str:
    return name.rsplit(".", 1)[0]


def _fingerprint(
    keys: PackedStrings, *columns: NDArray[np.int64], names: Sequence[str] = ()
) -> str:
    digest = hashlib.sha256(keys.data)
    for column in (keys.ends, *columns):
        digest.update(column.astype("<i8").tobytes())
    digest.update("\0".join(names).encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def write_shards(
    samples: Iterable[Mapping[str, Any]], pattern: str | os.PathLike[str], max_bytes: int = 1 << 28
) -> list[Path]:
    """Write samples as local WebDataset tars and return their paths; same samples, same bytes.

    Args:
        samples: `__key__` and the fields, as webdataset's TarWriter takes them (bytes, text, and
            for `json` anything that JSON can hold).
        pattern: path with a number in it, such as `out/train-%06d.tar`.
        max_bytes: a shard is closed when its samples have reached this many bytes.

    Raises:
        RadioError: a pattern without a number, or a key that is empty, has a dot in its last
            part, or occurs twice. No file appears or changes then.
    """
    target = Path(pattern)
    try:
        whole = target.name % 0 != target.name % 1 and target.suffix == ".tar"
    except (TypeError, ValueError):
        whole = False
    if not whole:
        raise RadioError(f"the pattern '{target}' is not of the form 'train-%06d.tar'")
    target.parent.mkdir(parents=True, exist_ok=True)
    folder = str(target.parent).replace("%", "%%")
    written: list[str] = []
    writer = webdataset.ShardWriter(
        f"{folder}/.{target.name}.part",
        maxcount=1 << 62,
        maxsize=max_bytes,
        post=written.append,
        verbose=0,
        mtime=0,
        user="radio",
        group="radio",
    )
    try:
        with contextlib.closing(writer):
            for sample in _with_good_keys(samples):
                writer.write(sample)
        return [part.rename(part.with_name(part.name[1:-5])) for part in map(Path, written)]
    finally:
        for name in written:
            Path(name).unlink(missing_ok=True)


def _with_good_keys(samples: Iterable[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    seen: set[str] = set()
    for sample in samples:
        key = str(sample["__key__"])
        if split_name(f"{key}.jpg") != (key, "jpg"):
            raise RadioError(
                f"the key '{key}' will not come back: a key ends at the first dot of its last part"
            )
        if key in seen:
            raise RadioError(f"the key '{key}' occurs twice; give every sample a name of its own")
        seen.add(key)
        yield sample
