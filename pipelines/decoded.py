"""Images kept decoded, so that a small data set is decoded once, not in every epoch."""

from __future__ import annotations

import threading

from pipelines.decode import Pixels

Place = tuple[int, int]  # shard, offset
USEFUL = 0.25  # share of the data set that must fit: to find fewer images here than that is not worth the memory
ENOUGH = 64  # images whose mean size tells that of all


class Decoded:
    """The pixels of whole images, up to a number of bytes; what is kept stays. Several threads may use it.

    `open`: whether more is wanted. Once it is clear that only a small part of the data set would fit, all is let go.
    """

    def __init__(self, most_bytes: int, num_images: int) -> None:
        """`num_images`: of the data set, each of which comes equally often."""
        self.open = most_bytes > 0
        self._most, self._num_images, self._used = most_bytes, num_images, 0
        self._kept: dict[Place, Pixels] = {}
        self._lock = threading.Lock()

    def get(self, place: Place) -> Pixels | None:
        return self._kept.get(place)

    def keep(self, place: Place, pixels: Pixels) -> None:
        with self._lock:
            if not self.open or place in self._kept:
                return
            if self._used + pixels.nbytes > self._most:
                self.open = False
            else:
                self._used += pixels.nbytes
                self._kept[place] = pixels
            mean = (self._used + pixels.nbytes) / (len(self._kept) + 1)
            if (len(self._kept) == ENOUGH or not self.open) and USEFUL * self._num_images * mean > self._most:
                self.open = False
                self._kept = {}
