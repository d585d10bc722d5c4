"""Writes one data set: tar shards that stock webdataset reads, and the manifest over them."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet
import webdataset as wds

from pipelines.hashing import hash_entity
from pipelines.manifest import FORMAT, ORDER_VERSION, VERSION, digest_of
from pipelines.prepare import PackedImage
from pipelines.records import Record, describe, make_key, member_groups, member_names
from pipelines.samples import SCHEMA, SHARDS_SCHEMA

BLOCK = 512  # of a tar: headers take one, contents are filled up to a multiple
SHARDS_PER_FILE = 1000  # row groups in one samples file, to keep its footer small


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


class ShardWriter:
    """Use as a context manager; the manifest is written at the end, unless an exception ends it."""

    def __init__(self, out: Path, kind: str, *, max_shard_bytes: int, class_names: Sequence[str] = ()) -> None:
        self.out, self.kind, self.max_shard_bytes = out, kind, max_shard_bytes
        self.class_index = {name: index for index, name in enumerate(class_names)}
        self.class_counts: Counter[str] = Counter()
        self.num_images = 0
        self.weighted = False
        self._shards: list[dict[str, Any]] = []
        self._runs: list[tuple[int, int, int]] = []  # shard, first row, length
        self._run_name: str | None = None
        self._index = 0
        self._open: _OpenShard | None = None
        self._samples: pyarrow.parquet.ParquetWriter | None = None
        (out / "samples").mkdir(parents=True)

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is None:
            self._finish()
        elif self._open is not None:
            self._open.out.abandon()

    @property
    def num_samples(self) -> int:
        return self._index

    @property
    def num_shards(self) -> int:
        return len(self._shards) + (self._open is not None)

    @property
    def nbytes(self) -> int:
        return sum(shard["nbytes"] for shard in self._shards)

    def write(self, record: Record, images: Sequence[PackedImage]) -> None:
        """Append one record. Records of one class that follow each other make a run."""
        key = make_key(self._index, record.name)
        payload = self._payload(record, images)
        nbytes = sum(BLOCK + _padded(len(data)) for data in payload.values())
        if self._open is not None and self._open.offset + nbytes > self.max_shard_bytes:
            self._close_shard()
        shard = self._open = self._open or self._new_shard()
        self._note_run(record, len(shard.rows))
        shard.tar.write({"__key__": key, **payload})
        shard.rows.append(self._row(record, images, key, payload, shard.offset, nbytes))
        shard.offset += nbytes
        self._index += 1
        self.num_images += len(images)
        self.weighted |= record.weight != 1.0

    def _payload(self, record: Record, images: Sequence[PackedImage]) -> dict[str, bytes]:
        names = member_names(self.kind, len(images))
        payload = {f"{name}.{image.suffix}".lstrip("."): image.data for name, image in zip(names, images, strict=True)}
        if self.kind == "labelled":
            payload["cls"] = str(self.class_index[record.entity or ""]).encode()
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
            position += BLOCK + _padded(len(payload[name]))
        names = [name for name in payload if name not in ("cls", "json")]
        return {
            "key": key,
            "source": record.name,
            "offset_record": offset,
            "nbytes_record": nbytes,
            "match": -1 if record.match is None else record.match,
            "weight": record.weight,
            "bad": False,
            "view": list(range(len(images))),
            "offset": [starts[name] for name in names],
            "size": [len(image.data) for image in images],
            "group": member_groups(self.kind, record, key),
            **{name: [getattr(image, name) for image in images] for name in ("crc32", "uid", "width", "height")},
        }

    def _note_run(self, record: Record, row: int) -> None:
        if self.kind != "labelled":
            return
        name = record.entity or ""
        shard = len(self._shards)
        if self._runs and self._run_name == name and self._runs[-1][0] == shard:
            self._runs[-1] = (shard, self._runs[-1][1], self._runs[-1][2] + 1)
        else:
            self._runs.append((shard, row, 1))
        self._run_name = name
        self.class_counts[name] += 1

    def _new_shard(self) -> _OpenShard:
        out = _HashedFile(self.out / f"{len(self._shards):06d}.tar")
        return _OpenShard(out, wds.TarWriter(out, mtime=0, encoder=False), 0, [])

    def _close_shard(self) -> None:
        assert self._open is not None
        shard, self._open = self._open, None
        shard.tar.close()
        shard.out.close()
        number = len(self._shards)
        samples = f"samples/{number // SHARDS_PER_FILE:05d}.parquet"
        if number % SHARDS_PER_FILE == 0:
            self._close_samples()
            self._samples = pyarrow.parquet.ParquetWriter(self.out / samples, SCHEMA, compression="zstd")
        assert self._samples is not None
        self._samples.write_table(pa.Table.from_pylist(shard.rows, SCHEMA), row_group_size=len(shard.rows))
        self._shards.append(
            {
                "url": f"{number:06d}.tar",
                "num_samples": len(shard.rows),
                "nbytes": shard.out.nbytes,
                "sha256": shard.out.digest.hexdigest(),
                "samples": samples,
                "row_group": number % SHARDS_PER_FILE,
                "num_bad": 0,
            }
        )

    def _close_samples(self) -> None:
        if self._samples is not None:
            self._samples.close()
            self._samples = None

    def _finish(self) -> None:
        if self._open is not None:
            self._close_shard()
        self._close_samples()
        shards = pa.Table.from_pylist(self._shards, SHARDS_SCHEMA)
        pyarrow.parquet.write_table(shards, self.out / "shards.parquet")
        runs = [list(column) for column in zip(*self._runs, strict=True)] or [[], [], []]
        runs_table = pa.table([pa.array(column, pa.int64()) for column in runs], names=["shard", "start", "length"])
        pyarrow.parquet.write_table(runs_table, self.out / "runs.parquet")
        names = sorted(self.class_counts)
        columns = {
            "name": names,
            "group": [hash_entity(name) for name in names],
            "count": [self.class_counts[n] for n in names],
        }
        types = (pa.string(), pa.int64(), pa.int64())
        classes = pa.table({name: pa.array(column, kind) for (name, column), kind in zip(columns.items(), types, strict=True)})
        pyarrow.parquet.write_table(classes, self.out / "classes.parquet")
        about = {
            "format": FORMAT,
            "version": VERSION,
            "order_version": ORDER_VERSION,
            "quarantine_version": 0,
            "kind": self.kind,
            "num_samples": self._index,
            "num_images": self.num_images,
            "num_shards": len(self._shards),
            "num_classes": len(names),
            "weighted": self.weighted,
            "nbytes": self.nbytes,
            "digest": digest_of(self.kind, shards),
        }
        (self.out / "manifest.json").write_text(json.dumps(about, indent=1) + "\n", "utf-8")


def _padded(nbytes: int) -> int:
    return -(-nbytes // BLOCK) * BLOCK
