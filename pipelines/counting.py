"""Tells how many images are done while tasks work on them, in whatever process or machine."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from pipelines.chunks import COUNT, TEMPORARY, read_chunk

Progress = Callable[[int, int | None], None]
EVERY_S = 1.0


@contextlib.contextmanager
def telling(progress: Progress | None, total: int, chunks: Path) -> Iterator[Callable[[], int]]:
    """Calls `progress(images, total)` at once, every second from a thread, and at the end unless an exception ends it.

    Yields a function that counts the images that were looked at, in all chunks below `chunks`.
    """
    counter = _Counter(chunks)
    if progress is None:
        yield counter
        return
    ended = threading.Event()

    def tell() -> None:
        progress(counter(), total)

    def watch() -> None:
        while not ended.wait(EVERY_S):
            tell()

    tell()
    thread = threading.Thread(target=watch, name="nearfar-progress", daemon=True)
    thread.start()
    try:
        yield counter
    finally:
        ended.set()
        thread.join()
    tell()


class _Counter:
    def __init__(self, chunks: Path) -> None:
        self._chunks = chunks
        self._finished: dict[str, int] = {}  # name of the chunk -> images
        self._last = 0
        self._lock = threading.Lock()

    def __call__(self) -> int:
        with self._lock:
            self._last = max(self._last, self._count())  # a task that starts again does not turn the count back
            return self._last

    def _count(self) -> int:
        under_way: dict[str, int] = {}
        for entry in self._chunks.iterdir():
            name, temporary, _ = entry.name.partition(TEMPORARY)
            if name in self._finished:
                continue
            with contextlib.suppress(OSError, ValueError):  # it is just being written, or renamed
                if temporary:
                    under_way[name] = max(under_way.get(name, 0), int((entry / COUNT).read_text()))
                elif (finished := read_chunk(entry)) is not None:
                    self._finished[name] = finished.images
        return sum(self._finished.values()) + sum(n for name, n in under_way.items() if name not in self._finished)
