"""Reads one shard front to back and compares it with the manifest."""

from __future__ import annotations

import hashlib
import io
import itertools
import zlib
from collections import Counter
from dataclasses import dataclass, field
from functools import lru_cache
from typing import BinaryIO

import numpy as np

from pipelines.decode import decode
from pipelines.hashing import Int64s, hash_bytes, hash_entity
from pipelines.keys import hash_keys
from pipelines.manifest import Manifest
from pipelines.samples import TARGET, ShardTable
from pipelines.tar import TarError, TarReader
from pipelines.tar_records import split_name
from pipelines.tar_urls import open_tar
from pipelines.vectors import decode_vector

_CHUNK = 2**20


@dataclass(frozen=True, slots=True)
class Fault:
    """Something that is not as it should be."""

    shard: str  # or the file of the manifest
    key: str  # empty: not of a single record
    offset: int
    reason: str


@dataclass(slots=True)
class ShardCheck:
    """What was found in a shard."""

    images: int = 0  # that were read and decoded
    nbytes: int = 0
    num_bad: int = 0  # records that the manifest calls bad: known, and not looked at
    faults: list[Fault] = field(default_factory=list)
    num_images: int = 0  # in the manifest's table
    vector_dim: int = 0
    target_dim: int = 0
    key_hashes: Int64s = field(default_factory=lambda: np.empty(0, np.int64))
    classes: Counter[str] = field(default_factory=Counter)
    runs: Int64s | None = None  # [r, 2] first row and length of the runs of one class; None: the table cannot be read


def check_shard(shard: int, *, path: str) -> ShardCheck:
    """Size, hash, tar headers, CRCs and pictures of the shard number `shard` of the data set in `path`."""
    manifest, found = _open(path), ShardCheck()
    name = manifest.shard_file(shard).name
    try:
        with open_tar(manifest.shard_file(shard).location) as file:
            _Checker(manifest, shard, file, found).run()
    except (RuntimeError, OSError, ValueError, TypeError, KeyError) as error:  # a damaged table can hold anything
        found.faults.append(Fault(name, "", 0, str(error)))
    return found


@lru_cache(maxsize=1)
def _open(path: str) -> Manifest:
    """Once in a process."""
    return Manifest.open(path)


class _Checker:
    def __init__(self, manifest: Manifest, shard: int, file: BinaryIO, found: ShardCheck) -> None:
        self.manifest, self.shard, self.file, self.found = manifest, shard, file, found
        self.name = manifest.shard_file(shard).name
        self.size = file.seek(0, 2)
        file.seek(0)
        self.digest = hashlib.sha256()

    def run(self) -> None:
        """Raises RuntimeError when the shard's table cannot be read; what is in the file is compared all the same."""
        try:
            self._check_records(self.manifest.table(self.shard))
        finally:
            self._hash_until(self.size)
            self._compare_whole()

    def _check_records(self, table: ShardTable) -> None:
        columns = {name: self.manifest.column(self.shard, name) for name in ("key", "label", "offset_record", "nbytes_record")}
        keys, starts, lengths = columns["key"], columns["offset_record"], columns["nbytes_record"]
        self.found.key_hashes, self.found.num_images = hash_keys(keys), int((table.dim == 0).sum())
        self.found.vector_dim = int(table.dim[table.view != TARGET].max(initial=0))
        self.found.target_dim = int(table.dim[table.view == TARGET].max(initial=0))
        self.found.num_bad = int(table.bad.sum())
        self._check_labels(table, keys, columns["label"])
        if len(keys) != self.manifest.sizes[self.shard]:
            self._blame("", 0, f"{len(keys)} records in its table, not {self.manifest.sizes[self.shard]} as in shards.parquet")
        for row in np.argsort(starts, kind="stable").tolist():
            start, length = starts[row], lengths[row]
            if start + length > self.size:
                self._blame(keys[row], start, f"cut off: the shard ends at byte {self.size}")
            elif start < self.found.nbytes or length <= 0:
                self._blame(keys[row], start, "the manifest puts it into another record")
            else:
                self._hash_until(start)
                data = self._read(length)
                if not table.bad[row]:
                    self._check_record(keys[row], data, start, table, int(table.start[row]), int(table.start[row + 1]))

    def _check_record(self, key: str, data: bytes, start: int, table: ShardTable, first: int, last: int) -> None:
        sizes = self._members(key, data, start)
        for image in range(first, last):
            offset, size = int(table.offset[image]), int(table.size[image])
            if sizes is not None and sizes.get(offset) != size:
                self._blame(key, offset, f"no member of {size} bytes begins here")
                continue
            member = data[offset - start : offset - start + size] if offset >= start else b""
            reason = _compare(member, table, image)
            if reason:
                self._blame(key, offset, reason)
            self.found.images += int(table.dim[image] == 0)

    def _members(self, key: str, data: bytes, start: int) -> dict[int, int] | None:
        """Sizes by offset, from the tar headers; None when these are damaged, which is noted."""
        sizes = {}
        try:
            for member in TarReader(io.BytesIO(data), start=start):
                own = split_name(member.name)[0]
                if member.type == "file" and own is not None and own != key and not key.endswith(f"/{own}"):
                    self._blame(key, member.start, f"a member of another record, {member.name}, lies here")
                sizes[member.offset] = member.size
                if member.end >= start + len(data):
                    break
        except TarError as error:
            self._blame(key, error.offset, error.reason)
            return None
        return sizes

    def _check_labels(self, table: ShardTable, keys: list[str], labels: list[str | None]) -> None:
        if self.manifest.kind != "labelled":
            self.found.runs = np.empty((0, 2), np.int64)
            return
        self.found.classes.update(str(label) for label in labels)
        groups = {label: hash_entity(label) for label in self.found.classes}
        for key, label, group in zip(keys, labels, table.group[table.start[:-1]].tolist(), strict=True):
            if groups[str(label)] != group:
                self._blame(key, 0, f"the manifest's group is not that of its class {label!r}")
        lengths = [len(list(run)) for _, run in itertools.groupby(labels)]
        self.found.runs = np.column_stack([np.cumsum([0, *lengths])[:-1], lengths])

    def _compare_whole(self) -> None:
        wanted = int(self.manifest.nbytes[self.shard])
        if self.size != wanted:
            self._blame("", min(self.size, wanted), f"the shard has {self.size} bytes, not {wanted} as in the manifest")
        elif self.digest.hexdigest() != self.manifest.sha256(self.shard):
            self._blame("", 0, "the shard is not the one in the manifest, or has changed (SHA-256)")

    def _read(self, size: int) -> bytes:
        data = self.file.read(size)
        self.digest.update(data)
        self.found.nbytes += len(data)
        if len(data) < size:
            raise RuntimeError(f"only {self.found.nbytes} of {self.size} bytes can be read")
        return data

    def _hash_until(self, end: int) -> None:
        while self.found.nbytes < end:
            self._read(min(_CHUNK, end - self.found.nbytes))

    def _blame(self, key: str, offset: int, reason: str) -> None:
        self.found.faults.append(Fault(self.name, key, offset, reason))


def _compare(data: bytes, table: ShardTable, image: int) -> str | None:
    """What is wrong with an image or a vector, if anything."""
    if zlib.crc32(data) != table.crc32[image]:
        return "the bytes have changed (CRC32)"
    if hash_bytes(data) != table.uid[image]:
        return "the manifest's uid is not that of the bytes"
    try:
        if table.dim[image]:
            decode_vector(data, int(table.dim[image]))
            return None
        height, width = decode(data).shape[:2]
    except ValueError as error:
        return str(error)
    wanted = (int(table.width[image]), int(table.height[image]))
    return None if (width, height) == wanted else f"{width} x {height} pixels, not {wanted[0]} x {wanted[1]} as in the manifest"
