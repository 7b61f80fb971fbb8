"""Bytes of local files, and of s3, gs, hf and http ones through fsspec.

Nothing stays open between two reads, so sources pickle, fork and run in threads as they are.
"""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path
from typing import Any

from fsspec.core import url_to_fs

from radio.errors import RadioError

# Failures of remote storage that are no OSError; each counts only where its package is in use.
CLIENT_ERRORS = (
    ("aiohttp", "ClientError"),
    ("botocore.exceptions", "BotoCoreError"),
    ("gcsfs.retry", "HttpError"),
    ("httpx", "HTTPError"),
)


def is_url(path: str) -> bool:
    """Tell whether fsspec reads the path (`s3://...`, chains with `::`) rather than the OS."""
    return "://" in path or "::" in path


def storage_errors() -> tuple[type[BaseException], ...]:
    """Return what the storage may raise when it fails: OSError and the loaded clients' own."""
    loaded = [(sys.modules[name], kind) for name, kind in CLIENT_ERRORS if name in sys.modules]
    return (OSError, *(vars(module)[kind] for module, kind in loaded))


def filesystem(url: str) -> tuple[Any, str]:
    """Return fsspec's file system of a URL and the path inside it.

    Raises:
        RadioError: a protocol that fsspec does not know, or whose package is not installed.
    """
    try:
        fs, inner = url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise RadioError(
            f"cannot open {url}: {error}; s3:// needs `pip install s3fs`, gs:// needs "
            "`pip install gcsfs`; hf:// and http(s):// need nothing more"
        ) from error
    return fs, str(inner)


def open_file(path: str) -> Any:
    """Open a file or URL for reading and seeking; fsspec's files are no `IO[bytes]` by type."""
    if not is_url(path):
        return Path(path).open("rb")
    fs, inner = filesystem(path)
    return fs.open(inner, "rb")


def read_range(path: str, offset: int, length: int) -> bytes:
    """Return `length` bytes from `offset` on.

    Raises:
        OSError: the storage failed, or the file has fewer bytes.
    """
    if not is_url(path):
        with Path(path).open("rb") as file:
            file.seek(offset)
            data = file.read(length)
    else:
        data = _read_url(path, offset, length)
    if len(data) != length:
        raise OSError(
            f"{path} gave {len(data)} bytes instead of {length} from byte {offset} on; it has "
            "changed since it was indexed, or its server ignores byte ranges"
        )
    return data


def _read_url(url: str, offset: int, length: int) -> bytes:
    if length == 0:
        return b""  # an empty range means the whole file to some servers
    fs, inner = filesystem(url)
    try:
        return bytes(fs.cat_file(inner, start=offset, end=offset + length))
    except OSError:
        raise
    except storage_errors() as error:
        raise OSError(f"reading {url} failed: {error}") from error


def version_of(path: str) -> str:
    """Return a digest that changes with the file: its path, size, and mtime or remote etag."""
    if is_url(path):
        fs, inner = filesystem(path)
        facts = f"{path}\0{fs.size(inner)}\0{fs.ukey(inner)}"
    else:
        stat = Path(path).stat()
        facts = f"{Path(path).resolve()}\0{stat.st_size}\0{stat.st_mtime_ns}"
    return hashlib.sha256(facts.encode("utf-8", "surrogateescape")).hexdigest()
