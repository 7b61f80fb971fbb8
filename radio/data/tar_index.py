"""Where each picture of WebDataset tars lies, learnt once from the tars' headers.

Keys and fields are webdataset's: `a/b.sem.png` is the field `sem.png` of the sample `a/b`.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
import os
import tarfile
import zipfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from radio.data.storage import is_url, open_file, read_range, storage_errors, version_of
from radio.errors import RadioError

log = logging.getLogger("radio.data")
EXTENSIONS = ("jpg", "jpeg", "png", "webp", "bmp", "tif", "tiff", "gif", "ppm")  # by preference
INDEX_VERSION = 2  # of the saved file; raise it when its content or the rules above change
READERS = 8  # shards whose headers are read at once; remote ones wait most of the time
COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")  # gzip, bzip2, xz, zstd


class PackedStrings:
    """Many strings in one run of bytes: a tenth of a list's memory, and quick to send."""

    def __init__(self, data: bytes, ends: NDArray[np.int64]) -> None:
        self.data = data
        self.ends = ends

    @classmethod
    def pack(cls, strings: Iterable[str]) -> PackedStrings:
        """Pack strings, also such as the file system could not decode."""
        parts = [string.encode("utf-8", "surrogateescape") for string in strings]
        ends = np.cumsum([len(part) for part in parts], dtype=np.int64)
        return cls(b"".join(parts), ends)

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> str:
        if not 0 <= index < len(self.ends):
            raise IndexError(f"sample {index} of {len(self.ends)}")
        start = int(self.ends[index - 1]) if index else 0
        return self.data[start : int(self.ends[index])].decode("utf-8", "surrogateescape")


@dataclass(frozen=True)
class TarIndex:
    """Each picture's key, shard number, and offset and length in bytes; samples without one."""

    shards: tuple[str, ...]
    keys: PackedStrings
    shard: NDArray[np.int64]
    offset: NDArray[np.int64]
    length: NDArray[np.int64]
    num_skipped: int


@dataclass
class _Sample:
    extension: str | None = None  # None: no picture among its fields so far
    offset: int = 0
    length: int = 0


def index_shards(paths: Sequence[str], index_dir: Path | None = None) -> TarIndex:
    """Read the headers of tars and return where their pictures lie.

    The picture of a sample is the first of EXTENSIONS it has, so that a label map beside a
    photograph is not taken for one; samples without a picture are skipped and counted. With
    `index_dir` the result is kept there, keyed by the shards' paths, sizes and times (or etags).
    Where the shards lie in several folders, their keys begin with the folder: `flickr8k/000000`.

    Raises:
        RadioError: a file that is no plain tar or is cut, no picture at all, a key that occurs
            twice.
    """
    kept = None if index_dir is None else index_dir / f"{_digest(paths)}.npz"
    if kept is not None and kept.exists() and (known := _load(kept, paths)) is not None:
        return known
    if len(paths) > READERS:
        log.info("reading the headers of %d shards", len(paths))
    with ThreadPoolExecutor(min(READERS, max(1, len(paths)))) as pool:
        samples = list(pool.map(_samples_of, paths))
    index = _join(paths, samples)
    _probe(index)
    if index.num_skipped:
        log.warning("%d samples without a picture were skipped", index.num_skipped)
    if kept is not None:
        _save(kept, index)
    return index


def _probe(index: TarIndex) -> None:
    """Read one remote picture now: a server that ignores byte ranges is no use later."""
    path = index.shards[int(index.shard[0])]
    if is_url(path):
        try:
            read_range(path, int(index.offset[0]), int(index.length[0]))
        except OSError as error:
            raise RadioError(_no_ranges(path, error)) from error


def split_name(name: str) -> tuple[str, str] | None:
    """Split a member's name at the first dot of its last part into key and lower-case field."""
    folder, slash, base = name.rpartition("/")
    stem, dot, field = base.partition(".")
    return (folder + slash + stem, field.lower()) if stem and dot else None


def _samples_of(path: str) -> dict[str, _Sample]:
    """Read one tar's headers; the samples are in the order of their first member."""
    samples: dict[str, _Sample] = {}
    last: tarfile.TarInfo | None = None
    try:
        with open_file(path) as file:
            _refuse_compressed(path, file)
            size = file.seek(0, os.SEEK_END)
            file.seek(0)
            with tarfile.open(fileobj=file, mode="r:") as tar:
                for member in tar:
                    last = member
                    _refuse_cut(path, member, size)
                    if member.isreg() and not member.issparse():
                        _add(path, samples, member)
                end = tar.offset
            _check_end(path, file, end, size)
    except tarfile.TarError as error:
        raise _broken(path, last, error) from error
    except storage_errors() as error:
        raise RadioError(f"cannot read {path}: {error}") from error
    except RadioError:
        raise
    except ValueError as error:  # how fsspec refuses to jump on a server without byte ranges
        raise RadioError(_no_ranges(path, error)) from error
    return samples


def _refuse_compressed(path: str, file: Any) -> None:
    if file.read(8).startswith(COMPRESSED):
        raise RadioError(
            f"{path} is compressed; pictures are read from the middle of a shard, so unpack it "
            "to a plain tar first"
        )


def _no_ranges(path: str, error: Exception) -> str:
    return f"{path} cannot be read from the middle ({error}); copy it to a disk or a bucket"


def _broken(path: str, last: tarfile.TarInfo | None, error: tarfile.TarError) -> RadioError:
    if last is None:
        return RadioError(
            f"{path} is no tar shard ({error}); expected tars as webdataset writes them"
        )
    return RadioError(
        f"{path} is cut or damaged after '{last.name}', which starts at byte {last.offset_data} "
        f"({error}); write or copy it again"
    )


def _refuse_cut(path: str, member: tarfile.TarInfo, size: int) -> None:
    end = member.offset_data + (member.size if member.isreg() else 0)
    if end > size:
        raise RadioError(
            f"{path} is cut: '{member.name}' starts at byte {member.offset_data} and should end "
            f"at {end}, but the file has {size} bytes; write or copy it again"
        )


def _check_end(path: str, file: Any, end: int, size: int) -> None:
    """Refuse what tarfile takes for the end in silence: no end marker, or more after it."""
    file.seek(end)
    tail = file.read(tarfile.RECORDSIZE)
    if len(tail) < tarfile.BLOCKSIZE:
        raise RadioError(
            f"{path} is cut at byte {size}: a tar's end marker is missing; write or copy it again"
        )
    if any(tail[: tarfile.BLOCKSIZE]):
        raise RadioError(f"{path} is damaged: no header at byte {end}; write or copy it again")
    if any(tail):
        raise RadioError(
            f"{path} goes on after its end marker at byte {end}; were tars joined by `cat`? "
            "Give them as separate shards"
        )


def _add(path: str, samples: dict[str, _Sample], member: tarfile.TarInfo) -> None:
    split = split_name(member.name)
    if split is None:
        return
    key, extension = split
    sample = samples.setdefault(key, _Sample())
    if extension not in EXTENSIONS:
        return
    if sample.extension == extension:
        raise _twin(key, path, path)
    if sample.extension is None or _rank(extension) < _rank(sample.extension):
        samples[key] = _Sample(extension, member.offset_data, member.size)


def _rank(extension: str) -> int:
    return EXTENSIONS.index(extension)


def _join(paths: Sequence[str], samples: Sequence[dict[str, _Sample]]) -> TarIndex:
    first_shard: dict[str, int] = {}
    rows: list[tuple[int, int, int]] = []
    skipped: list[str] = []
    prefixes = _prefixes(paths)
    for number, found in enumerate(samples):
        for own, sample in found.items():
            key = prefixes[number] + own
            if sample.extension is None:
                skipped.append(key)
                continue
            if key in first_shard:
                raise _twin(key, paths[first_shard[key]], paths[number])
            first_shard[key] = number
            rows.append((number, sample.offset, sample.length))
    if not rows:
        raise _no_picture(paths, skipped)
    table = np.array(rows, dtype=np.int64)
    shard, offset, length = (np.ascontiguousarray(table[:, column]) for column in range(3))
    keys = PackedStrings.pack(first_shard)
    return TarIndex(tuple(paths), keys, shard, offset, length, len(skipped))


def _prefixes(paths: Sequence[str]) -> list[str]:
    """Return what goes before the keys of each shard: its folder, where the shards lie in several.

    Sets of one making often number their samples alike. The folder is named from where the paths
    part, so that keys do not depend on where the sets lie.
    """
    folders = [path.split("/")[:-1] for path in paths]
    common = sum(
        1
        for _ in itertools.takewhile(
            lambda parts: len(set(parts)) == 1, zip(*folders, strict=False)
        )
    )
    return ["".join(f"{part}/" for part in folder[common:]) for folder in folders]


def _twin(key: str, first: str, second: str) -> RadioError:
    where = f"twice in {first}" if first == second else f"in {first} and in {second}"
    return RadioError(
        f"the key '{key}' occurs {where}; targets are joined by key, so give every sample a name "
        "of its own (or open splits apart: 'train-*.tar', not '*.tar')"
    )


def _no_picture(paths: Sequence[str], skipped: Sequence[str]) -> RadioError:
    some = ", ".join(paths[:3]) + (", ..." if len(paths) > 3 else "")
    seen = f" {len(skipped)} samples have other fields only, first '{skipped[0]}';" * bool(skipped)
    return RadioError(
        f"no picture in {some};{seen} expected a field of {', '.join(EXTENSIONS)} (a name's field "
        "starts at its first dot: 'a.b.jpg' has the field 'b.jpg')"
    )


def _digest(paths: Sequence[str]) -> str:
    digest = hashlib.sha256(f"{INDEX_VERSION}".encode())
    for path in paths:
        try:
            digest.update(version_of(path).encode())
        except storage_errors() as error:
            raise RadioError(f"cannot read {path}: {error}") from error
    return digest.hexdigest()[:32]


def _save(path: Path, index: TarIndex) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    # Several processes may index at once: each writes its own file, the last rename wins.
    temporary = path.with_name(f".{path.stem}-{os.getpid()}.npz")
    np.savez(
        temporary,
        keys=np.frombuffer(index.keys.data, dtype=np.uint8),
        ends=index.keys.ends,
        shard=index.shard,
        offset=index.offset,
        length=index.length,
        num_skipped=np.array(index.num_skipped),
    )
    temporary.replace(path)


def _load(path: Path, paths: Sequence[str]) -> TarIndex | None:
    """Read a kept index; one that is broken is made again, since it is only a copy."""
    try:
        with np.load(path, allow_pickle=False) as file:
            keys = PackedStrings(file["keys"].tobytes(), file["ends"])
            shard, offset, length = file["shard"], file["offset"], file["length"]
            skipped = int(file["num_skipped"])
            return TarIndex(tuple(paths), keys, shard, offset, length, skipped)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        log.warning("the index %s is broken (%s) and is made again", path, error)
        return None
