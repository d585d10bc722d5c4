"""Bytes of images out of shards, local or remote, checked against the manifest."""

from __future__ import annotations

import threading
import time
import zlib
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path

from configs.errors import Unrecoverable
from configs.schema import Data
from pipelines.blocks import Blocks, Counts
from pipelines.cache import OpenFile
from pipelines.manifest import Manifest, ShardFile
from pipelines.watch import Watch

OPEN_FILES = 256
PAUSES_S = (0.1, 0.5)  # before a shard that cannot be opened is tried again


class Reader:
    """Reads by offset, from any number of threads at once. Files stay open; `close` closes them.

    Local shards are read where they lie, remote ones in blocks through the node's cache. `counts` and `watch` tell of it.
    """

    def __init__(self, manifest: Manifest, data: Data | None = None) -> None:
        """`data` says how remote shards are fetched; without it, as by default."""
        self.counts, self.watch = Counts(), Watch()
        self._manifest, self._data = manifest, data or Data(train=manifest.location)
        self._files: OrderedDict[int, OpenFile] = OrderedDict()
        self._blocks: Blocks | None = None  # made when there is something remote to read
        self._closed = False
        self._lock = threading.Lock()

    def prefetch(self, shard: Sequence[int], offset: Sequence[int], size: Sequence[int]) -> list[Future[None]]:
        """Fetch what these images need in the background; `read` is quick once all that is returned is done.  [n] each"""
        files = {number: self._manifest.shard_file(number) for number in set(shard)}
        ranges = [(files[i], first, length) for i, first, length in zip(shard, offset, size, strict=True) if files[i].remote]
        return self._remote().prefetch(ranges) if ranges else []

    def read(self, shard: int, offset: int, size: int, crc32: int) -> bytes:
        """`size` bytes from `offset` of a shard.

        Raises ValueError when they are not what was packed; RuntimeError when the shard is not there or not to be had.
        """
        file = self._manifest.shard_file(shard)
        data = self._remote().read(file, offset, size) if file.remote else self._pread(shard, file, offset, size)
        if not _fits(data, size, crc32):
            data = self._read_again(shard, file, offset, size, crc32)
        with self._lock:
            self.counts.bytes_read += size
        return data

    def close(self) -> None:
        with self._lock:
            self._closed = True
            self._files.clear()
            blocks, self._blocks = self._blocks, None
        if blocks is not None:
            blocks.close()

    def _read_again(self, shard: int, file: ShardFile, offset: int, size: int, crc32: int) -> bytes:
        """Once more: a network file system may have had a hiccup, a block in the cache be damaged."""
        if file.remote:
            data = self._remote().read_again(file, offset, size, lambda data: _fits(data, size, crc32))
        else:
            data = self._pread(shard, file, offset, size)
        if len(data) != size:
            raise ValueError(f"the shard ends early: {len(data)} of {size} bytes")
        if not _fits(data, size, crc32):
            raise ValueError("the bytes have changed since they were packed (CRC32)")
        return data

    def _pread(self, shard: int, file: ShardFile, offset: int, size: int) -> bytes:
        with self.watch.busy(file.location, offset):
            opened = self._local(shard, file)
            try:
                return opened.read(size, offset)
            except OSError as error:
                raise ValueError(f"cannot read {file.name}: {error.strerror}") from error

    def _local(self, shard: int, file: ShardFile) -> OpenFile:
        with self._lock:
            found = self._files.get(shard)
            if found is not None:
                self._files.move_to_end(shard)
                return found
        found = _open_patiently(file)  # outside the lock: it may take long
        with self._lock:
            self._files[shard] = found
            if len(self._files) > OPEN_FILES:
                self._files.popitem(last=False)
        return found

    def _remote(self) -> Blocks:
        with self._lock:
            if self._closed:
                raise RuntimeError("the reader is closed")
            if self._blocks is None:
                self._blocks = Blocks(self._data, self.counts, self.watch)
            return self._blocks


def _fits(data: bytes, size: int, crc32: int) -> bool:
    return len(data) == size and zlib.crc32(data) == crc32


def _open_patiently(file: ShardFile) -> OpenFile:
    for pause in (*PAUSES_S, None):
        try:
            return OpenFile.open(Path(file.location))
        except OSError as error:
            if pause is None:
                kind = Unrecoverable if isinstance(error, FileNotFoundError) else RuntimeError
                raise kind(f"cannot open the shard {file.location!r}: {error.strerror}; restore it or pack again") from error
            time.sleep(pause)
    raise AssertionError
