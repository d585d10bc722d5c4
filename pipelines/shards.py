"""Writes tar shards that stock webdataset reads, and says of each what lies where."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Protocol, TypeVar

import pyarrow as pa
import webdataset as wds

from pipelines.hashing import Int64s
from pipelines.prepare import PackedImage
from pipelines.records import Record, describe, make_key, member_groups, member_names
from pipelines.samples import SCHEMA, TARGET

SizeT = TypeVar("SizeT", int, Int64s)
BLOCK = 512  # of a tar: headers take one, contents are filled up to a multiple


class _HashedFile:
    """A file that hashes what is written to it."""

    def __init__(self, path: Path) -> None:
        self.file: IO[bytes] = path.open("wb")
        self.digest = hashlib.sha256()
        self.nbytes = 0

    def write(self, data: bytes) -> int:
        self.digest.update(data)
        self.nbytes += len(data)
        return len(data) if self.file.closed else self.file.write(data)

    def abandon(self) -> None:
        """Close without writing through; what a tar still writes when it is collected goes nowhere."""
        with contextlib.suppress(OSError):
            self.file.close()

    def close(self) -> None:
        """Write through to the disk, so that a rename later never shows an empty shard."""
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()


@dataclass(slots=True)
class _OpenShard:
    out: _HashedFile
    tar: Any
    offset: int
    rows: list[dict[str, Any]]


class Sink(Protocol):
    """What is told of every finished shard, in their order; ManifestWriter.add is one."""

    def __call__(self, url: str, nbytes: int, sha256: str, samples: pa.Table, /) -> object: ...


class ShardWriter:
    """Tars of at most `max_bytes` or one record, and of at most `max_records`. Use as a context manager."""

    def __init__(
        self,
        out: Path,
        kind: str,
        sink: Sink,
        *,
        max_bytes: int,
        max_records: int | None = None,
        class_index: Mapping[str, int] | None = None,
    ) -> None:
        """`class_index` numbers the classes of labelled data for the `.cls` members."""
        self.out, self.kind, self.max_bytes, self.max_records = out, kind, max_bytes, max_records
        self._class_index = class_index or {}
        self._sink = sink
        self._num_shards = 0
        self._open: _OpenShard | None = None

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._open is not None and error is None:
            self._close_shard()
        elif self._open is not None:
            self._open.out.abandon()

    def write(self, place: int, record: Record, images: Sequence[PackedImage]) -> None:
        """Append one record; `place` is unique in the data set. Records of one class that follow each other make a run.

        `images` are what its `files` have become.
        """
        key = make_key(place, record.name)
        payload = self._payload(record, images)
        nbytes = sum(member_nbytes(len(data)) for data in payload.values())
        if self._open is not None and self._is_full(self._open, nbytes):
            self._close_shard()
        shard = self._open = self._open or self._new_shard()
        shard.tar.write({"__key__": key, **payload})
        shard.rows.append(self._row(record, images, key, payload, shard.offset, nbytes))
        shard.offset += nbytes

    def _is_full(self, shard: _OpenShard, nbytes: int) -> bool:
        return shard.offset + nbytes > self.max_bytes or len(shard.rows) == self.max_records

    def _payload(self, record: Record, images: Sequence[PackedImage]) -> dict[str, bytes]:
        names = member_names(self.kind, len(record.images)) + ([] if record.target is None else ["target"])
        payload = {f"{name}.{image.suffix}".lstrip("."): image.data for name, image in zip(names, images, strict=True)}
        if self.kind == "labelled":
            payload["cls"] = str(self._class_index[record.entity or ""]).encode()
        about = describe(self.kind, record)
        if about is not None:
            payload["json"] = about
        return payload

    def _row(
        self, record: Record, images: Sequence[PackedImage], key: str, payload: dict[str, bytes], offset: int, nbytes: int
    ) -> dict[str, Any]:
        starts, position = {}, offset
        for name in sorted(payload):  # the order in which TarWriter writes them
            starts[name] = position + BLOCK
            position += member_nbytes(len(payload[name]))
        names = [name for name in payload if name not in ("cls", "json")]
        return {
            "key": key,
            "source": record.name,
            "label": record.entity,
            "offset_record": offset,
            "nbytes_record": nbytes,
            "match": -1 if record.match is None else record.match,
            "weight": record.weight,
            "bad": False,
            "view": [*range(len(record.images)), *([] if record.target is None else [TARGET])],
            "offset": [starts[name] for name in names],
            "size": [len(image.data) for image in images],
            "group": member_groups(self.kind, record, key),
            **{name: [getattr(image, name) for image in images] for name in ("crc32", "uid", "width", "height", "dim")},
        }

    def _new_shard(self) -> _OpenShard:
        out = _HashedFile(self.out / self._name())
        return _OpenShard(out, wds.TarWriter(out, mtime=0, encoder=False), 0, [])

    def _close_shard(self) -> None:
        assert self._open is not None
        shard, self._open = self._open, None
        shard.tar.close()
        shard.out.close()
        samples = pa.Table.from_pylist(shard.rows, SCHEMA)
        self._sink(self._name(), shard.out.nbytes, shard.out.digest.hexdigest(), samples)
        self._num_shards += 1

    def _name(self) -> str:
        return shard_name(self._num_shards)


def shard_name(number: int) -> str:
    return f"{number:06d}.tar"


def member_nbytes(nbytes: SizeT) -> SizeT:
    """What a file, or each of an array of files, takes in a tar: its header, and its contents filled up to whole blocks."""
    return BLOCK + -(-nbytes // BLOCK) * BLOCK
