"""Pictures in folders or WebDataset shards, read by (shard, offset, length) from an index.

The index is made once from the tars' headers, so that step N needs no step N-1.
"""

from __future__ import annotations

import glob
import hashlib
import tarfile
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import braceexpand
import fsspec
import numpy as np

from radio.errors import RadioError

EXTENSIONS = ("jpg", "jpeg", "png", "webp", "bmp", "tif", "tiff", "gif", "ppm")  # by preference


@runtime_checkable
class ImageSource(Protocol):
    """Numbered pictures; picklable, opens its files in each process anew."""

    @property
    def fingerprint(self) -> str:
        """SHA-256 over keys and lengths, independent of where the files lie."""

    def __len__(self) -> int: ...

    def key(self, index: int) -> str:
        """Return the sample's key."""

    def read(self, index: int) -> bytes:
        """Return the picture's encoded bytes."""


def open_images(location: str | Sequence[str]) -> ImageSource:
    """Open a folder of pictures, or WebDataset tars by path, brace pattern, glob, URL or list.

    Raises:
        RadioError: nothing there, no picture in it, a cut tar, or a key that occurs twice.
    """
    if isinstance(location, str) and "://" not in location and Path(location).is_dir():
        folder = Path(location)
        tars = sorted(map(str, folder.glob("*.tar")))
        return ShardSource(index_shards(tars)) if tars else _open_folder(folder)
    return ShardSource(index_shards(expand(location)))


def expand(location: str | Sequence[str]) -> list[str]:
    """Return the shard paths that a pattern (or a list of patterns) names, in order."""
    patterns = [location] if isinstance(location, str) else list(location)
    paths: list[str] = []
    for pattern in patterns:
        for path in braceexpand.braceexpand(pattern):
            wild = "://" not in path and any(sign in path for sign in "*?[")
            found = sorted(glob.glob(path)) if wild else [path]
            if not found or ("://" not in path and not all(Path(p).exists() for p in found)):
                raise RadioError(
                    f"{path} does not exist; expected a folder of pictures, or WebDataset tars "
                    "such as 'shards/train-{000000..000009}.tar'"
                )
            paths += found
    return paths


@dataclass(frozen=True)
class _Folder:
    """A folder of picture files, sorted by path."""

    root: Path
    names: tuple[str, ...]
    fingerprint: str

    def __len__(self) -> int:
        return len(self.names)

    def key(self, index: int) -> str:
        return str(Path(self.names[index]).with_suffix(""))

    def read(self, index: int) -> bytes:
        return (self.root / self.names[index]).read_bytes()


def _open_folder(folder: Path) -> _Folder:
    paths = sorted(p for p in folder.rglob("*") if p.suffix.lower()[1:] in EXTENSIONS)
    if not paths:
        raise RadioError(f"{folder} holds no pictures ({', '.join(EXTENSIONS)}) and no tar shards")
    names = tuple(str(path.relative_to(folder)) for path in paths)
    _refuse_twins(str(Path(name).with_suffix("")) for name in names)
    sizes = [path.stat().st_size for path in paths]
    return _Folder(folder, names, _fingerprint(zip(names, sizes, strict=True)))


@dataclass(frozen=True)
class Index:
    """Where each picture lies: shard number, offset and length in bytes."""

    shards: tuple[str, ...]
    keys: tuple[str, ...]
    shard: np.ndarray
    offset: np.ndarray
    length: np.ndarray


class ShardSource:
    """Pictures inside tars, read by offset; file handles are per process and thread."""

    def __init__(self, index: Index) -> None:
        self.index = index
        lengths = index.length.tolist()
        self.fingerprint = _fingerprint(zip(index.keys, lengths, strict=True))
        self._local = threading.local()

    def __len__(self) -> int:
        return len(self.index.keys)

    def key(self, index: int) -> str:
        """Return the sample's key."""
        return self.index.keys[index]

    def read(self, index: int) -> bytes:
        """Return the picture's encoded bytes."""
        file = self._file(int(self.index.shard[index]))
        file.seek(int(self.index.offset[index]))
        length = int(self.index.length[index])
        data: bytes = file.read(length)
        if len(data) != length:
            shard = self.index.shards[int(self.index.shard[index])]
            raise OSError(f"{shard} ended inside '{self.key(index)}'")
        return data

    def _file(self, shard: int) -> Any:
        if not hasattr(self._local, "files"):
            self._local.files = dict[int, Any]()
        files = self._local.files
        if shard not in files:
            files[shard] = fsspec.open(self.index.shards[shard], "rb").open()
        return files[shard]

    def __getstate__(self) -> dict[str, Any]:
        return {"index": self.index, "fingerprint": self.fingerprint}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _local=threading.local())


def index_shards(paths: Sequence[str]) -> Index:
    """Read the headers of tars and return where their pictures lie.

    A sample is the files that share a name up to the first dot; its picture is the first of
    EXTENSIONS it has, so that label maps beside a photograph are not taken for pictures.

    Raises:
        RadioError: a file that is no tar or is cut, no picture at all, a key that occurs twice.
    """
    keys: list[str] = []
    rows: list[tuple[int, int, int]] = []
    for number, path in enumerate(paths):
        for key, (offset, length) in _pictures_of(path).items():
            keys.append(key)
            rows.append((number, offset, length))
    if not rows:
        raise RadioError(
            f"no picture ({', '.join(EXTENSIONS)}) in {', '.join(paths[:3]) or 'no tars'}"
        )
    _refuse_twins(keys)
    table = np.array(rows, dtype=np.int64)
    return Index(tuple(paths), tuple(keys), table[:, 0], table[:, 1], table[:, 2])


def _pictures_of(path: str) -> dict[str, tuple[int, int]]:
    found: dict[str, tuple[int, int, int]] = {}
    member = None
    try:
        with fsspec.open(path, "rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            size = file.seek(0, 2)
            file.seek(0)
            for member in tar:
                if member.isfile():
                    _refuse_cut(path, member, size)
                    _add(found, member)
    except (tarfile.TarError, EOFError) as error:
        where = f"after '{member.name}' " if member is not None else ""
        raise RadioError(
            f"{path} is no whole tar shard: it breaks {where}({error}); write or copy it again"
        ) from error
    except OSError as error:
        raise RadioError(f"cannot read {path}: {error}") from error
    return {key: (offset, length) for key, (_, offset, length) in found.items()}


def _add(found: dict[str, tuple[int, int, int]], member: tarfile.TarInfo) -> None:
    folder, _, name = member.name.rpartition("/")
    stem, _, extension = name.partition(".")
    if extension.lower() not in EXTENSIONS:
        return
    key = f"{folder}/{stem}" if folder else stem
    rank = EXTENSIONS.index(extension.lower())
    if key not in found or rank < found[key][0]:
        found[key] = (rank, member.offset_data, member.size)


def _refuse_cut(path: str, member: tarfile.TarInfo, size: int) -> None:
    if member.offset_data + member.size > size:
        raise RadioError(
            f"{path} is cut: '{member.name}' should end at byte {member.offset_data + member.size} "
            f"but the file has {size}; write or copy it again"
        )


def _refuse_twins(keys: Iterable[str]) -> None:
    seen: set[str] = set()
    for key in keys:
        if key in seen:
            raise RadioError(
                f"the key '{key}' occurs twice; targets are joined by key, so give every sample "
                "a name of its own"
            )
        seen.add(key)


def _fingerprint(rows: Iterable[tuple[str, int]]) -> str:
    digest = hashlib.sha256()
    for key, length in rows:
        digest.update(f"{key}\0{length}\n".encode())
    return digest.hexdigest()
