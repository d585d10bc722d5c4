"""What the tests of the loader share."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import torch

from configs.schema import Augment, Data
from pipelines.batch import Batch
from pipelines.hashing import hash_entity
from pipelines.manifest import Manifest
from pipelines.manifest_writer import ManifestWriter
from pipelines.records import LocalFile, Record, member_groups
from pipelines.samples import IMAGE_COLUMNS, SCHEMA
from pipelines.stream import Loader

AUGMENT = Augment(crop=(0.5, 1.0), flip=0.5, color=0.3)


def settings(**values: Any) -> Data:
    defaults = {
        "train": "x",
        "image_size": 16,
        "batch": 8,
        "lanes": 4,
        "window": 16,
        "augment": AUGMENT,
        "max_bad_fraction": 1.0,
    }
    return Data.model_validate({**defaults, **values})


def take(manifest: Manifest, data: Data, count: int, **options: Any) -> list[Batch]:
    with Loader(manifest, data, **{"seed": 5, **options}) as loader:
        return [next(loader) for _ in range(count)]


def assert_equal(one: Batch, other: Batch) -> None:
    for field in fields(Batch):
        left, right = getattr(one, field.name), getattr(other, field.name)
        assert (left is None and right is None) or torch.equal(left, right), field.name


def joined(parts: Iterable[Batch]) -> Batch:
    """Ranks' batches as one; records are counted on."""
    parts = list(parts)
    values: dict[str, Any] = {}
    for field in fields(Batch):
        tensors = [getattr(part, field.name) for part in parts]
        values[field.name] = None if tensors[0] is None else torch.cat(tensors)
    starts = np.cumsum([0, *[part.num_records for part in parts]])
    values["record"] = torch.cat([part.record + int(start) for part, start in zip(parts, starts, strict=False)])
    return Batch(**values)


def samples(batches: Iterable[Batch]) -> list[tuple[int, ...]]:
    return [tuple(row) for batch in batches for row in batch.sample.tolist()]


def samples_table(kind: str, labels: Sequence[str | None], shard: int, *, images: int = 2) -> pa.Table:
    """A shard's samples table as the writer of shards makes it, for an order that reads no image."""
    rows = []
    for row, label in enumerate(labels):
        key = f"{shard:04d}-{row:04d}"
        n = 1 if kind == "labelled" else images
        record = Record((LocalFile(Path(key), key),) * n, entity=label, match=row % 2 if kind == "labelled_pair" else None)
        members = {name: [0] * n for name in IMAGE_COLUMNS} | {"uid": [hash_entity(f"{key}/{i}") for i in range(n)]}
        members |= {"view": list(range(n)), "group": member_groups(kind, record, key)}
        about = {"key": key, "source": key, "label": label, "offset_record": 0, "nbytes_record": 0, "bad": False}
        rows.append({**about, "match": -1 if record.match is None else record.match, "weight": 1.0, **members})
    return pa.Table.from_pylist(rows, SCHEMA)


def write_manifest(out: Path, kind: str, shards: Sequence[Sequence[str | None]]) -> Manifest:
    """A data set without its tars: the labels of the records of every shard."""
    writer = ManifestWriter(out, kind)
    for shard, labels in enumerate(shards):
        writer.add(
            f"{shard:06d}.tar", 0, hashlib.sha256(f"{shard} {labels}".encode()).hexdigest(), samples_table(kind, labels, shard)
        )
    writer.finish()
    return Manifest.open(out)


def write_union(out: Path, parts: Sequence[Manifest]) -> Manifest:
    """A data set of the shards of others, one after the other, which stay where they are: data that has grown."""
    writer = ManifestWriter(out, parts[0].kind)
    for part in parts:
        listed = pyarrow.parquet.read_table(part.path / "shards.parquet").to_pylist()
        for shard, row in enumerate(listed):
            table = pyarrow.parquet.ParquetFile(part.path / row["samples"]).read_row_group(row["row_group"])
            writer.add(str(part.shard_path(shard)), row["nbytes"], row["sha256"], table)
    writer.finish()
    return Manifest.open(out)
