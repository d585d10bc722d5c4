"""Bytes of images out of local shards, checked against the manifest."""

from __future__ import annotations

import os
import threading
import zlib
from collections import OrderedDict
from pathlib import Path

from pipelines.manifest import Manifest

OPEN_FILES = 256


class Reader:
    """Reads by offset, from any number of threads at once. Files stay open; `close` closes them."""

    def __init__(self, manifest: Manifest) -> None:
        self._manifest = manifest
        self._files: OrderedDict[int, _File] = OrderedDict()
        self._lock = threading.Lock()

    def read(self, shard: int, offset: int, size: int, crc32: int) -> bytes:
        """`size` bytes from `offset` of a shard.

        Raises ValueError when they are not what was packed; RuntimeError when the shard is not there at all.
        """
        file = self._file(shard)
        try:
            return _checked(file.read(size, offset), size, crc32)
        except ValueError:  # once more: a network file system may have had a hiccup
            return _checked(file.read(size, offset), size, crc32)

    def close(self) -> None:
        with self._lock:
            self._files.clear()

    def _file(self, shard: int) -> _File:
        with self._lock:
            if shard not in self._files:
                self._files[shard] = _File(self._manifest.shard_path(shard))
                if len(self._files) > OPEN_FILES:
                    self._files.popitem(last=False)
            self._files.move_to_end(shard)
            return self._files[shard]


def _checked(data: bytes, size: int, crc32: int) -> bytes:
    if len(data) != size:
        raise ValueError(f"the shard ends early: {len(data)} of {size} bytes")
    if zlib.crc32(data) != crc32:
        raise ValueError("the bytes have changed since they were packed (CRC32)")
    return data


class _File:
    """Closed when nobody uses it any more, which may be after the reader has dropped it."""

    def __init__(self, path: Path) -> None:
        self._fd = -1
        try:
            self._fd = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        except OSError as error:
            raise RuntimeError(f"cannot open the shard {str(path)!r}: {error.strerror}; restore it or pack again") from error
        self._path = path

    def read(self, size: int, offset: int) -> bytes:
        try:
            return os.pread(self._fd, size, offset)
        except OSError as error:
            raise ValueError(f"cannot read {self._path.name}: {error.strerror}") from error

    def __del__(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
