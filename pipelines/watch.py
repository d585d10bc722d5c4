"""What the threads of a loader are busy with: tells a slow source from one that hangs."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from contextlib import contextmanager


class Watch:
    """`last` is when anything was finished (time.monotonic). Used by many threads at once."""

    def __init__(self) -> None:
        self.last = time.monotonic()
        self._under_way: dict[int, tuple[float, str, int]] = {}  # in the order in which they began
        self._numbers = itertools.count()

    @contextmanager
    def busy(self, what: str, offset: int) -> Iterator[None]:
        """Around reading `what` (a shard) from byte `offset`."""
        number = next(self._numbers)
        self._under_way[number] = (time.monotonic(), what, offset)
        try:
            yield
        finally:
            del self._under_way[number]
            self.last = time.monotonic()

    def longest(self) -> str:
        """The oldest thing under way, for a message."""
        under_way = list(self._under_way.values())
        if not under_way:
            return "no read is under way"
        since, what, offset = under_way[0]
        return f"{what} at byte {offset}, for {time.monotonic() - since:.0f} s"
