"""K rows of one class at a time: the units of balanced P x K batches."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pipelines.hashing import Int64s, hash_ints, stream
from pipelines.manifest import Runs

_TAG_CUT = 11


class Units:
    """Cuts every run of one class into units of `per_class` rows, anew in every epoch.

    A run's rest below `per_class` is filled with masked duplicates (`tail` = pad) or left out for the epoch (drop).
    `sizes` [M] are the units per shard, over which an Order runs.
    """

    def __init__(self, runs: Runs, num_shards: int, *, per_class: int, tail: str, seed: int) -> None:
        """runs: of all shards, those of a shard together and in the order of the shards."""
        self.runs, self.per_class, self.seed = runs, per_class, seed
        self._starts = np.zeros(len(runs.length) + 1, dtype=np.int64)  # units before each run, over all shards
        units = self._starts[1:]  # worked on in place: at a billion images every copy costs as much as the arithmetic
        np.add(runs.length, per_class - 1 if tail == "pad" else 0, out=units)
        np.floor_divide(units, per_class, out=units)
        np.cumsum(units, out=units)
        first_run = np.searchsorted(runs.shard, np.arange(num_shards + 1))
        self._shard_first = self._starts[first_run[:-1]]
        self.sizes: Int64s = np.diff(self._starts[first_run])

    def rows(self, epoch: Int64s, shard: Int64s, unit: Int64s) -> tuple[Int64s, NDArray[np.bool_]]:
        """Rows of the shard, and which of them are no duplicates.  [U] each -> [U, K], [U, K]; the first is always valid."""
        index = self._shard_first[shard] + unit
        run = np.searchsorted(self._starts, index, side="right") - 1
        unit_in_run = index - self._starts[run]
        length = self.runs.length[run]
        shuffle = self._shuffles(epoch, run, length)
        place = unit_in_run[:, None] * self.per_class + np.arange(self.per_class)
        valid = place < length[:, None]
        left = np.minimum(length - unit_in_run * self.per_class, self.per_class)  # rows that the unit really has
        place = unit_in_run[:, None] * self.per_class + np.arange(self.per_class) % left[:, None]
        return self.runs.start[run][:, None] + np.take_along_axis(shuffle, place, axis=1), valid

    def _shuffles(self, epoch: Int64s, run: Int64s, length: Int64s) -> Int64s:
        """A permutation of each run's rows, keyed by the epoch and the run.  -> [U, longest]"""
        key = hash_ints(self.seed, _TAG_CUT, epoch, self.runs.shard[run], self.runs.start[run])
        draws = stream(key, int(length.max(initial=0)))
        outside = np.arange(draws.shape[1]) >= length[:, None]
        # Sorting by (outside, draw) without a second key: the lowest bit of 64 is given up.
        draws = (draws >> np.uint64(1)) | (outside.astype(np.uint64) << np.uint64(63))
        return np.argsort(draws, axis=1, kind="stable")
