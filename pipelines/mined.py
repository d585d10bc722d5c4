"""Triplets of images that lie in shards already, as records that `pack` can write."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from functools import partial
from hashlib import sha256

import numpy as np
import pyarrow as pa

from pipelines.columns import ColumnRecords
from pipelines.hashing import Int64s
from pipelines.manifest import Manifest
from pipelines.records import MEMBERS, Listing
from pipelines.sources.tars import read_range


@dataclass(frozen=True, slots=True)
class StoredImage:
    """An image inside a shard; `name` is its record's key there, and which image of the record it is."""

    name: str
    location: str  # of the shard
    offset: int
    size: int
    crc32: int

    def read(self) -> bytes:
        """Raises OSError when it is not what the manifest says; as `fetch` does when a store does not give it."""
        data = read_range(self.location, self.offset, self.size)
        if zlib.crc32(data) != self.crc32:
            raise OSError(f"{self.location} differs from its manifest at byte {self.offset}; see `nearfar verify`")
        return data


class StoredImages:
    """n images of a data set by number: `uid` [n] (equal bytes have equal uids), `size` [n] bytes."""

    def __init__(self, manifest: Manifest, records: Int64s, members: Int64s) -> None:
        """Image `members` [n] (0: the first) of record `records` [n]."""
        self._manifest, self._records, self._members = manifest, records, members
        self._shard = np.searchsorted(manifest.starts, records, side="right") - 1
        self.uid, self.size, self._offset, self._crc32 = (np.empty(len(records), np.int64) for _ in range(4))
        for shard in np.unique(self._shard).tolist():
            rows = np.flatnonzero(self._shard == shard)
            table = manifest.table(shard)
            at = table.start[records[rows] - manifest.starts[shard]] + members[rows]
            self.uid[rows], self.size[rows] = table.uid[at], table.size[at]
            self._offset[rows], self._crc32[rows] = table.offset[at], table.crc32[at]
        self._keys = {shard: pa.array(manifest.keys(shard)) for shard in np.unique(self._shard).tolist()}

    def __len__(self) -> int:
        return len(self.uid)

    def key(self, number: int) -> str:
        """Of the record that the image is in."""
        shard = int(self._shard[number])
        return str(self._keys[shard][int(self._records[number] - self._manifest.starts[shard])])

    def image(self, number: int) -> StoredImage:
        member = MEMBERS[self._manifest.kind][int(self._members[number])]
        name = f"{self.key(number)}.{member}" if member else self.key(number)
        location = self._manifest.shard_file(int(self._shard[number])).location
        return StoredImage(name, location, int(self._offset[number]), int(self.size[number]), int(self._crc32[number]))


def list_triplets(images: StoredImages, rows: Int64s, groups: list[str], group: Int64s, *, stamp: str) -> Listing:
    """Triplets `rows` [T, 2 + N] of numbers of images: anchor, positive, negatives; -1 where a triplet has fewer negatives.

    groups [C], group [n]: names, and the name's number for each image. `stamp` differs when other triplets are meant.
    """
    columns = [partial(_image, images, rows[:, column]) for column in range(rows.shape[1])]
    names = pa.array(groups, pa.large_string())
    records = ColumnRecords(
        len(rows),
        columns,
        entities=pa.DictionaryArray.from_arrays(pa.array(group[rows[:, 0]]), names),
        negative_entities=lambda row: tuple(groups[group[image]] for image in rows[row, 2:].tolist() if image >= 0),
    )
    sizes = np.where(rows >= 0, images.size[rows], 0)
    digest = sha256(stamp.encode() + np.ascontiguousarray(rows).tobytes()).hexdigest()
    return Listing(records, nbytes=int(sizes.sum()), sizes=sizes, stamp=digest)


def _image(images: StoredImages, column: Int64s, row: int) -> StoredImage | None:
    return images.image(int(column[row])) if column[row] >= 0 else None
