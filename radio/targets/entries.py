"""A folder of arrays by key: each file is whole and proves it, and any process may add to it.

A file is safetensors followed by 32 bytes, the SHA-256 of its key and of what comes before. That
finds what a power cut or a bad disk left, so that nothing has to wait for the disk when writing.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import secrets
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors.numpy import load, save

from radio.errors import RadioError

log = logging.getLogger("radio.cache")
SAID = "said"  # the array that holds an entry's JSON
DIGEST_BYTES = 32
ABANDONED_SECONDS = 24 * 3600.0  # no write takes a day: its process was killed


class Entry(NamedTuple):
    """Arrays by name, and whatever else JSON can hold."""

    arrays: Mapping[str, np.ndarray]
    said: Mapping[str, Any]


class EntryFolder:
    """Entries by key (SHA-256 in hex), in 256 folders by the key's first two digits.

    The file system is the index, so a million entries are found as fast as one. Two processes
    that make the same entry at once write the same bytes, and the later one stays.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.bytes_read = 0
        self.bytes_written = 0
        self._unfinished = folder / "unfinished"
        for path in self._unfinished.glob("*"):
            with contextlib.suppress(OSError):  # another process may clear it at the same time
                if time.time() - path.stat().st_mtime > ABANDONED_SECONDS:
                    path.unlink()

    def path(self, key: str) -> Path:
        """Return where an entry lies."""
        return self.folder / key[:2] / key[2:]

    def get(self, key: str, what: str) -> Entry | None:
        """Return an entry, or None where there is none or (logged as `what`) a damaged one."""
        path = self.path(key)
        try:
            with path.open("rb") as file:
                size = os.fstat(file.fileno()).st_size - DIGEST_BYTES
                content, digest = file.read(max(size, 0)), file.read()
        except FileNotFoundError:
            return None
        except OSError as error:
            log.warning("cannot read %s in %s (%s); making it again", what, path, error)
            return None
        if digest != _digest(key, content):
            log.warning("%s in %s is damaged (wrong checksum); making it again", what, path)
            return None
        self.bytes_read += len(content) + DIGEST_BYTES
        arrays = load(content)
        said = json.loads(arrays.pop(SAID).tobytes())
        return Entry(arrays, said)

    def put(self, key: str, entry: Entry, what: str) -> None:
        """Write an entry, all of it or nothing.

        Raises:
            RadioError: the disk is full or the folder cannot be written; names `what` and cache.
        """
        said = np.frombuffer(json.dumps(entry.said).encode(), dtype=np.uint8)
        # safetensors writes an array's memory as it lies, whatever its strides say.
        arrays = {name: np.ascontiguousarray(array) for name, array in entry.arrays.items()}
        content = save({**arrays, SAID: said})
        temporary = self._unfinished / f"{key}-{secrets.token_hex(8)}"
        try:
            self._unfinished.mkdir(parents=True, exist_ok=True)
            self.path(key).parent.mkdir(exist_ok=True)
            with temporary.open("wb") as file:
                file.write(content)
                file.write(_digest(key, content))
            temporary.replace(self.path(key))
        except OSError as error:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise RadioError(
                f"cache={self.folder} cannot take {what} ({len(content) / 1e6:.1f} MB): "
                f"{error.strerror}; free some space there, choose another cache=, or go without "
                "(cache=null)"
            ) from error
        self.bytes_written += len(content) + DIGEST_BYTES


def key_of(values: Mapping[str, Any]) -> str:
    """Return the SHA-256 in hex of values that JSON can hold, whatever their order."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _digest(key: str, content: bytes) -> bytes:
    digest = hashlib.sha256(key.encode())
    digest.update(content)
    return digest.digest()
