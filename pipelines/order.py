"""Which sample stands where in the endless training stream: a pure function of (seed, epoch, position).

The samples of all shards, the shards shuffled, are cut into `lanes` slices that are read side by side; within a lane,
windows of `window` samples are shuffled. Position p of an epoch is in lane p mod lanes. The number of workers never
enters: it only cuts a batch, at the very end.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from typing import TypeVar

import numpy as np
from numpy.typing import ArrayLike

from pipelines.hashing import Int64s, hash_ints, permutation

_TAG_SHARDS, _TAG_STAGGER, _TAG_BLOCK = 1, 2, 3

Value = TypeVar("Value")


class Order:
    """The order of sum(sizes) samples in shards of the given sizes. Setting it up and seeking read nothing.

    Not safe to use from several threads at once: it remembers the shuffles that it used last.
    """

    def __init__(self, sizes: ArrayLike, *, seed: int, lanes: int = 64, window: int = 2048) -> None:
        """sizes: [M] samples per shard. Raises ValueError when there is no sample."""
        self.sizes: Int64s = np.asarray(sizes, dtype=np.int64)
        self.num_samples = int(self.sizes.sum())
        if self.num_samples < 1 or self.sizes.min() < 0:
            raise ValueError(f"{len(self.sizes)} shards with {self.num_samples} samples in all: nothing to order")
        self.seed, self.lanes, self.window = seed, lanes, window
        self._epochs: OrderedDict[int, tuple[Int64s, Int64s]] = OrderedDict()
        self._blocks: OrderedDict[tuple[int, int, int], Int64s] = OrderedDict()

    def slice(self, position: int, batch: int, rank: int = 0, world: int = 1) -> tuple[Int64s, Int64s, Int64s]:
        """(epoch, shard, row), each [n]: this rank's part of the stream's positions [position, position + batch).

        The batch is sorted by (epoch, lane, place in the lane) before it is cut, so that a rank reads few places.
        """
        return self.part(position, batch, batch * rank // world, batch * (rank + 1) // world)

    def part(self, position: int, batch: int, first: int, last: int) -> tuple[Int64s, Int64s, Int64s]:
        """(epoch, shard, row): elements [first, last) of the sorted batch of `slice`."""
        positions = np.arange(position, position + batch, dtype=np.int64)
        epoch, place = np.divmod(positions, self.num_samples)
        offset, lane = np.divmod(place, self.lanes)
        mine = np.lexsort((offset, lane, epoch))[first:last]
        epoch, lane, offset = epoch[mine], lane[mine], offset[mine]
        return epoch, *self._locate(epoch, self._shuffle(epoch, lane, offset))

    def _shuffle(self, epoch: Int64s, lane: Int64s, offset: Int64s) -> Int64s:
        """Index into the epoch's concatenation of shards.  [n] each"""
        short, longer = divmod(self.num_samples, self.lanes)  # the first `longer` lanes hold one more
        lane_start = lane * short + np.minimum(lane, longer)
        lane_length = short + (lane < longer)
        stagger = (hash_ints(self.seed, _TAG_STAGGER, epoch, lane) % np.uint64(self.window)).astype(np.int64)
        block = (offset + stagger) // self.window
        start = np.maximum(block * self.window - stagger, 0)
        length = np.minimum((block + 1) * self.window - stagger, lane_length) - start
        shuffled = np.empty_like(offset)
        # The batch is sorted by (epoch, lane, offset), so that the rows of a block stand together.
        change = (np.diff(epoch) != 0) | (np.diff(lane) != 0) | (np.diff(block) != 0)
        borders = [0, *(np.flatnonzero(change) + 1).tolist(), len(offset)]
        for first, last in itertools.pairwise(borders):
            if first < last:
                inside = self._block(int(epoch[first]), int(lane[first]), int(block[first]), int(length[first]))
                shuffled[first:last] = inside[offset[first:last] - start[first:last]]
        return np.asarray(lane_start + start + shuffled, dtype=np.int64)

    def _locate(self, epoch: Int64s, index: Int64s) -> tuple[Int64s, Int64s]:
        """(shard, row) of an index into the concatenation of the epoch's shuffled shards."""
        shard, row = np.empty_like(index), np.empty_like(index)
        for one in np.unique(epoch).tolist():
            of_epoch = epoch == one
            shuffle, ends = self._shards(one)
            place = np.searchsorted(ends, index[of_epoch], side="right")
            shard[of_epoch] = shuffle[place]
            row[of_epoch] = index[of_epoch] - (ends[place] - self.sizes[shuffle[place]])
        return shard, row

    def _shards(self, epoch: int) -> tuple[Int64s, Int64s]:
        """The epoch's order of the shards, and where each of them ends.  [M], [M]"""
        if epoch not in self._epochs:
            shuffle = permutation(len(self.sizes), self.seed, _TAG_SHARDS, epoch)
            _remember(self._epochs, epoch, (shuffle, np.cumsum(self.sizes[shuffle])), limit=4)
        return self._epochs[epoch]

    def _block(self, epoch: int, lane: int, block: int, length: int) -> Int64s:
        key = (epoch, lane, block)
        if key not in self._blocks:
            shuffle = permutation(length, self.seed, _TAG_BLOCK, *key)
            _remember(self._blocks, key, shuffle, limit=4 * self.lanes)
        return self._blocks[key]


Key = TypeVar("Key")


def _remember(cache: OrderedDict[Key, Value], key: Key, value: Value, *, limit: int) -> None:
    cache[key] = value
    while len(cache) > limit:
        cache.popitem(last=False)
