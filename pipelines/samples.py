"""The tables of a manifest on disk, and the samples table of one shard in memory."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
from numpy.typing import NDArray

from pipelines.hashing import Int64s

TARGET = -1  # the `view` of a record's target, the last of its members

# Per member, an image or a vector; on disk lists of these, one list a record.
IMAGE_COLUMNS: dict[str, pa.DataType] = {
    "view": pa.int8(),
    "offset": pa.int64(),  # of the bytes, from the start of the tar
    "size": pa.int32(),
    "crc32": pa.uint32(),
    "uid": pa.int64(),
    "group": pa.int64(),
    "width": pa.int32(),  # as shown, after EXIF orientation
    "height": pa.int32(),
    "dim": pa.int32(),  # numbers of a vector (`.npy`, float32); 0 for an image
}
RECORD_COLUMNS: dict[str, pa.DataType] = {
    "key": pa.string(),
    "source": pa.string(),
    "label": pa.string(),  # name of the class, or of the group of a pair or triplet; null where there is none
    "offset_record": pa.int64(),  # of the first tar header
    "nbytes_record": pa.int64(),  # all its members with their headers
    "match": pa.int8(),
    "weight": pa.float32(),
    "bad": pa.bool_(),
}
SHARDS_SCHEMA = pa.schema(
    {
        "url": pa.string(),  # relative to the manifest, or absolute
        "num_samples": pa.int64(),
        "nbytes": pa.int64(),
        "sha256": pa.string(),
        "samples": pa.string(),  # the file with its samples table, and the row group there
        "row_group": pa.int64(),
        "num_bad": pa.int64(),
    }
)
SCHEMA = pa.schema({**RECORD_COLUMNS, **{name: pa.list_(kind) for name, kind in IMAGE_COLUMNS.items()}})


@dataclass(frozen=True, slots=True)
class ShardTable:
    """n records with m members (images, vectors, targets) in all; those of record i are `start[i]:start[i + 1]`."""

    start: Int64s  # [n + 1]
    view: Int64s  # [m]
    offset: Int64s  # [m]
    size: Int64s  # [m]
    crc32: Int64s  # [m]
    uid: Int64s  # [m]
    group: Int64s  # [m]
    width: Int64s  # [m]
    height: Int64s  # [m]
    dim: Int64s  # [m] numbers of a vector, 0 for an image
    match: Int64s  # [n], -1 where there is none
    weight: NDArray[np.float32]  # [n]
    bad: NDArray[np.bool_]  # [n]


def read_table(path: Path, row_group: int) -> ShardTable:
    """One shard's row group as numpy arrays. Raises RuntimeError when the file is missing or damaged."""
    columns = [*IMAGE_COLUMNS, "match", "weight", "bad"]
    try:
        table = pyarrow.parquet.ParquetFile(path).read_row_group(row_group, columns=columns).combine_chunks()
    except (OSError, pa.ArrowException, IndexError) as error:
        raise RuntimeError(f"{str(path)!r} cannot be read: {error}; restore it or pack the data again") from error
    missing = [name for name in columns if name not in table.column_names]
    if missing:
        raise RuntimeError(f"{str(path)!r} lacks the column {', '.join(missing)}; pack or index the data again")
    lists = {name: table[name].chunk(0) for name in IMAGE_COLUMNS}
    images: dict[str, Any] = {name: column.flatten().to_numpy().astype(np.int64) for name, column in lists.items()}
    start = lists["uid"].offsets.to_numpy().astype(np.int64)
    return ShardTable(
        start=start - start[0],
        match=table["match"].to_numpy().astype(np.int64),
        weight=table["weight"].to_numpy().astype(np.float32),
        bad=table["bad"].to_numpy().astype(np.bool_),
        **images,
    )
