"""Remote shards in aligned blocks: fetched ahead by threads, once for all processes of the node, and read from its disk."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import IO

from configs.schema import Data
from pipelines.cache import NodeCache, OpenFile
from pipelines.manifest import ShardFile
from pipelines.remote import fetch
from pipelines.threads import Threads
from pipelines.watch import Watch

MIB, GB = 2**20, 10**9
OPEN_BLOCKS = 256
SHARE_OF_TIMEOUT = 0.9  # a fetch gives up, with its own reason, before the loader does


@dataclass(slots=True)
class Counts:
    """What a reader did so far; blocks found on the node's disk are hits."""

    bytes_read: int = 0
    bytes_fetched: int = 0
    cache_hits: int = 0
    cache_misses: int = 0


@dataclass(frozen=True, slots=True)
class Block:
    """Bytes [start, stop) of a shard."""

    shard: ShardFile
    start: int
    stop: int

    @property
    def name(self) -> str:
        """Of its file: with the hash of the whole shard, so that another shard at the same URL is never taken for it."""
        return f"blocks/{self.shard.sha256[:2]}/{self.shard.sha256}.{self.start}-{self.stop}"


class Blocks:
    """Reads shards behind URLs, from any number of threads at once."""

    def __init__(self, data: Data, counts: Counts, watch: Watch) -> None:
        """Raises RuntimeError when the cache folder cannot be used."""
        self._block_bytes = max(1, int(data.block_mb * MIB))
        self._timeout_s = SHARE_OF_TIMEOUT * data.timeout_s
        self._cache = NodeCache(data.cache, int(data.cache_gb * GB))
        self._counts, self._watch = counts, watch
        self._files: OrderedDict[Block, OpenFile] = OrderedDict()
        self._coming: dict[Block, Future[None]] = {}
        self._lock = threading.Lock()
        self._threads = Threads(data.io_threads, "fetch")

    def prefetch(self, ranges: Iterable[tuple[ShardFile, int, int]]) -> list[Future[None]]:
        """Start to fetch what the ranges (shard, offset, size) need and what is not at hand; nothing is fetched twice."""
        wanted = dict.fromkeys(block for shard, offset, size in ranges for block in self._covering(shard, offset, size))
        with self._lock:
            missing = [block for block in wanted if block not in self._files]
            for block in missing:
                if block not in self._coming:
                    self._coming[block] = self._threads.submit(self._bring, block)
            return [self._coming[block] for block in missing]

    def read(self, shard: ShardFile, offset: int, size: int) -> bytes:
        """What the node's disk says, or the source when it is not there; fewer bytes when the shard ends early."""
        parts = []
        for block in self._covering(shard, offset, size):
            start, stop = max(offset, block.start), min(offset + size, block.stop)
            parts.append(self._file(block).read(stop - start, start - block.start))
            if len(parts[-1]) < stop - start:
                break
        return b"".join(parts)

    def read_again(self, shard: ShardFile, offset: int, size: int, good: Callable[[bytes], bool]) -> bytes:
        """What the source says; when that is `good`, the blocks on the disk are not, and are dropped."""
        data = self._fetch(shard, offset, offset + size)
        if good(data):
            for block in self._covering(shard, offset, size):
                self._cache.drop(block.name)
                with self._lock:
                    self._files.pop(block, None)
        return data

    def close(self) -> None:
        self._threads.shutdown()
        with self._lock:
            self._files.clear()

    def _covering(self, shard: ShardFile, offset: int, size: int) -> list[Block]:
        step = self._block_bytes
        starts = range(offset // step * step, min(offset + size, shard.nbytes), step)
        return [Block(shard, start, min(start + step, shard.nbytes)) for start in starts]

    def _file(self, block: Block) -> OpenFile:
        with self._lock:
            found = self._files.get(block)
            if found is not None:
                self._files.move_to_end(block)
        return found or self._open(block)

    def _bring(self, block: Block) -> None:
        """Runs in the threads. Gives back no file, or what waits for it would keep too many of them open."""
        try:
            self._open(block)
        finally:
            with self._lock:
                del self._coming[block]

    def _open(self, block: Block) -> OpenFile:
        def write(file: IO[bytes]) -> None:
            file.write(self._fetch(block.shard, block.start, block.stop))

        with self._watch.busy(block.shard.location, block.start):
            opened, fetched = self._cache.open(block.name, write, timeout_s=self._timeout_s)
        with self._lock:
            self._counts.cache_misses += fetched
            self._counts.cache_hits += not fetched
            self._files[block] = opened
            while len(self._files) > OPEN_BLOCKS:
                self._files.popitem(last=False)
        return opened

    def _fetch(self, shard: ShardFile, start: int, stop: int) -> bytes:
        with self._watch.busy(shard.location, start):
            data = fetch(shard.location, start, stop, timeout_s=self._timeout_s)
        with self._lock:
            self._counts.bytes_fetched += len(data)
        return data
