"""A stretch of the write order that one task turns into shards, wholly or not at all."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet

from pipelines.folders import sync
from pipelines.parallel import ordered_map
from pipelines.prepare import PackedImage, prepare_vector
from pipelines.records import Record
from pipelines.samples import SCHEMA
from pipelines.shards import ShardWriter, shard_name
from pipelines.urls import Answers, UrlFile
from pipelines.work import write_json

ABOUT = "chunk.json"
COUNT = "count"
COUNT_EVERY_S = 0.5
REMOTE_THREADS = 16  # a store takes long to answer, and answers many at once
TEMPORARY = ".tmp-"

Prepare = Callable[[bytes], PackedImage]


@dataclass(frozen=True, slots=True)
class Chunk:
    """All that a task needs, on whatever machine it runs."""

    folder: Path  # of its own, there once it is done
    kind: str
    first: int  # place of its first record in the write order
    records: list[Record]
    class_index: dict[str, int]
    prepare: Prepare
    max_bytes: int  # of a shard
    max_records: int | None
    threads: int


@dataclass(frozen=True, slots=True)
class Shard:
    """One shard of a finished chunk."""

    tar: Path
    nbytes: int
    sha256: str

    @property
    def samples(self) -> pa.Table:
        return pyarrow.parquet.read_table(self.tar.with_suffix(".parquet"), schema=SCHEMA)


@dataclass(frozen=True, slots=True)
class Finished:
    """A chunk on disk."""

    shards: list[Shard]
    rejected: list[tuple[str, str]]  # image, reason
    images: int  # all that were looked at


@dataclass(frozen=True, slots=True)
class Prepared:
    """A record and its images, as far as they are of use."""

    record: Record
    images: list[PackedImage] = field(default_factory=list)  # of the record's `files`
    rejected: list[tuple[str, str]] = field(default_factory=list)
    errors: list[Exception | None] = field(default_factory=list)  # one a file


def write_chunk(chunk: Chunk) -> None:
    """Read, prepare and write its records; the folder appears at the end. Nothing is done when it is there.

    One bad image rejects its whole record: half a pair teaches nothing.
    """
    if chunk.folder.is_dir():
        return
    temporary = chunk.folder.with_name(f"{chunk.folder.name}{TEMPORARY}{uuid.uuid4().hex}")
    temporary.mkdir()
    try:
        about = _write_into(temporary, chunk)
        write_json(temporary / ABOUT, about)
        sync(temporary)
        try:
            os.replace(temporary, chunk.folder)
        except OSError:
            if not chunk.folder.is_dir():  # a cluster may run a task twice
                raise
        sync(chunk.folder.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def read_chunk(folder: Path) -> Finished | None:
    """None when it is not finished."""
    try:
        about: dict[str, Any] = json.loads((folder / ABOUT).read_text("utf-8"))
    except FileNotFoundError:
        return None
    shards = [Shard(folder / shard_name(number), nbytes, sha256) for number, (nbytes, sha256) in enumerate(about["shards"])]
    return Finished(shards, [(image, reason) for image, reason in about["rejected"]], about["images"])


def prepare_record(record: Record, *, prepare: Prepare) -> Prepared:
    """Read and prepare its images; what is wrong with them is told, not raised."""
    result = Prepared(record)
    for image in record.files:
        try:
            result.images.append(prepare_vector(image.read()) if image is record.target else prepare(image.read()))
            result.errors.append(None)
        except (OSError, ValueError) as error:
            result.errors.append(error)
            result.rejected.append((image.name, "no such file" if isinstance(error, FileNotFoundError) else str(error)))
    if not result.rejected and all(image.dim for image in result.images):
        result.rejected.append((record.name, "no image in the record, only vectors"))
    return result


def num_threads(records: list[Record], threads: int) -> int:
    """More than `threads` where images come from a store."""
    remote = any(isinstance(image, UrlFile) for record in records for image in record.files)
    return max(threads, REMOTE_THREADS) if remote else threads


def _write_into(folder: Path, chunk: Chunk) -> dict[str, object]:
    shards: list[tuple[int, str]] = []
    rejected: list[tuple[str, str]] = []
    images, counted, answers = 0, time.monotonic(), Answers()

    def note(url: str, nbytes: int, sha256: str, samples: pa.Table) -> None:
        path = (folder / url).with_suffix(".parquet")
        pyarrow.parquet.write_table(samples, path)
        sync(path)
        shards.append((nbytes, sha256))

    writer = ShardWriter(
        folder, chunk.kind, note, max_bytes=chunk.max_bytes, max_records=chunk.max_records, class_index=chunk.class_index
    )
    threads = num_threads(chunk.records, chunk.threads)
    with (
        writer,
        contextlib.closing(ordered_map(partial(prepare_record, prepare=chunk.prepare), chunk.records, threads)) as prepared,
    ):
        for place, item in enumerate(prepared, chunk.first):
            images += len(item.record.images)
            for image, error in zip(item.record.files, item.errors, strict=True):
                answers.note(image, error)
            rejected += item.rejected
            if not item.rejected:
                writer.write(place, item.record, item.images)
            if time.monotonic() - counted > COUNT_EVERY_S:
                counted = time.monotonic()
                (folder / COUNT).write_text(str(images))
    answers.require()  # else a store that has just gone down would cost the images it did not give
    (folder / COUNT).unlink(missing_ok=True)
    return {"shards": shards, "rejected": rejected, "images": images}
