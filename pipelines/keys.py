"""Finds keys that name more than one record, over all shards, in 8 bytes a record."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from pipelines.hashing import Int64s, hash_bytes
from pipelines.manifest import Manifest


def hash_keys(keys: Sequence[str]) -> Int64s:
    """[n]"""
    return np.asarray([hash_bytes(key.encode()) for key in keys], np.int64)


def repeated_keys(manifest: Manifest, hashes: Sequence[Int64s]) -> Iterator[tuple[str, list[tuple[int, int]]]]:
    """Each key that comes again, with shard and row of both places. `hashes` [M] are of the keys of each shard."""
    joined = np.concatenate([np.empty(0, np.int64), *hashes])
    ends = np.cumsum([len(part) for part in hashes])
    order = np.argsort(joined, kind="stable")
    again = np.flatnonzero(joined[order][1:] == joined[order][:-1])
    for index in again.tolist():
        places = []
        for record in order[index : index + 2].tolist():
            shard = int(np.searchsorted(ends, record, side="right"))
            places.append((shard, record - int(ends[shard]) + len(hashes[shard])))
        first, second = (manifest.keys(shard)[row] for shard, row in places)
        if first == second:  # not only their hashes
            yield first, places
