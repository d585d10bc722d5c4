"""The file that `nearfar embed` writes: a row an image, and in its metadata what made it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
from numpy.typing import NDArray

from cluster.embed_worker import REJECTED, Part, schema
from pipelines.folders import sync

ABOUT = b"nearfar"
VERSION = 1
GROUP_BYTES = 32 * 2**20  # of vectors in a row group: what a reader holds at a time
SHOWN = ("key", "label", "member", "record")


@dataclass(frozen=True, slots=True)
class Row:
    """An image of the file: its number there, and its columns but for the vector."""

    number: int
    key: str
    label: str | None
    member: str
    record: int | None


class Embeddings:
    """A parquet file of vectors, read a row group at a time. `about` is empty when `nearfar embed` did not write it."""

    def __init__(self, path: Path) -> None:
        """Raises ValueError when there is no such file, or no vectors in it."""
        self.path = path
        try:
            self._file = pyarrow.parquet.ParquetFile(path)
        except (OSError, pa.ArrowException) as error:
            raise ValueError(f"{str(path)!r} cannot be read: {error}; make it with `nearfar embed MODEL SOURCE OUT`") from error
        columns = self._file.schema_arrow
        kind = columns.field("embedding").type if "embedding" in columns.names else None
        if "key" not in columns.names or kind is None or not pa.types.is_fixed_size_list(kind):
            raise ValueError(f"{str(path)!r} has no columns key and embedding as `nearfar embed` writes them")
        self.dim: int = kind.list_size
        self.about: dict[str, Any] = json.loads((columns.metadata or {}).get(ABOUT, b"{}"))
        if self.about.get("version", VERSION) != VERSION:
            raise ValueError(f"{str(path)!r} is of version {self.about['version']}; this program reads version {VERSION}")
        groups = [self._file.metadata.row_group(i).num_rows for i in range(self._file.num_row_groups)]
        self._starts = np.concatenate([[0], np.cumsum(groups)]).astype(np.int64)
        self._shown = [name for name in SHOWN if name in columns.names]

    @property
    def raw(self) -> bool:
        """Whether the vectors have any length and are compared by euclidean distance."""
        return self.about.get("distance") == "euclidean"

    @property
    def num_rows(self) -> int:
        return int(self._starts[-1])

    def vectors(self) -> Iterator[tuple[int, NDArray[np.float32]]]:
        """(number of the first row, vectors [n, dim]), one row group after the other."""
        for group, start in enumerate(self._starts[:-1].tolist()):
            yield start, self._vectors(group)

    def vector(self, row: int) -> NDArray[np.float32]:
        """One vector.  [dim]"""
        group = self._group(row)
        found: NDArray[np.float32] = self._vectors(group)[row - int(self._starts[group])]
        return found

    def rows(self, numbers: Sequence[int]) -> dict[int, Row]:
        """What is known of some rows, by their numbers."""
        found = {}
        for group in sorted({self._group(row) for row in numbers}):
            start = int(self._starts[group])
            table = self._file.read_row_group(group, columns=self._shown)
            for row in sorted({row for row in numbers if self._group(row) == group}):
                told = {"label": None, "member": "", "record": None, **table.slice(row - start, 1).to_pylist()[0]}
                found[row] = Row(row, **told)
        return found

    def find(self, key: str) -> list[int]:
        """The rows of a key."""
        found: list[int] = []
        for group, start in enumerate(self._starts[:-1].tolist()):
            keys = self._file.read_row_group(group, columns=["key"])["key"].to_numpy()
            found += (np.flatnonzero(keys == key) + start).tolist()
        return found

    def _group(self, row: int) -> int:
        return int(np.searchsorted(self._starts, row, side="right")) - 1

    def _vectors(self, group: int) -> NDArray[np.float32]:
        column = self._file.read_row_group(group, columns=["embedding"])["embedding"].combine_chunks()
        flat = column.flatten().to_numpy(zero_copy_only=False)
        return np.asarray(flat, np.float32).reshape(-1, self.dim)


class Parts:
    """The finished spans of an embedding, a file each, in a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(exist_ok=True)
        for left in folder.glob("*.tmp"):
            left.unlink()
        self.there = {int(path.stem) for path in folder.glob("*.arrow")}

    def add(self, part: Part) -> None:
        """Through to the disk, wholly or not at all."""
        path = self._path(part.number)
        temporary = path.with_suffix(".tmp")
        with temporary.open("wb") as file:
            file.write(part.data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        self.there.add(part.number)

    def count(self) -> int:
        """Rows and rejected images that are there."""
        return sum(table.num_rows + len(rejected) for table, rejected in map(self._read, sorted(self.there)))

    def join(self, count: int, file: Path, dim: int, about: dict[str, Any]) -> tuple[int, list[dict[str, Any]]]:
        """Write all parts into one parquet file, in their order; returns its rows, and what was rejected."""
        rejected: list[dict[str, Any]] = []
        rows, waiting, most = 0, [], max(1, GROUP_BYTES // (4 * dim))
        kept = schema(dim).with_metadata({ABOUT: json.dumps(about).encode()})
        options = {"compression": {**dict.fromkeys(SHOWN, "zstd"), "embedding.list.element": "none"}}
        with pyarrow.parquet.ParquetWriter(file, kept, use_dictionary=["label", "member"], **options) as writer:
            for number in range(count):
                table, told = self._read(number)
                rejected += told
                rows += table.num_rows
                waiting.append(table.replace_schema_metadata(None))
                if sum(one.num_rows for one in waiting) >= most:
                    waiting = self._write(writer, waiting, most)
            self._write(writer, waiting, 0)
        sync(file)
        return rows, rejected

    def _write(self, writer: pyarrow.parquet.ParquetWriter, waiting: list[pa.Table], most: int) -> list[pa.Table]:
        """Row groups of `most` rows, and what is left; 0: all of it."""
        table = pa.concat_tables(waiting) if waiting else None
        while table is not None and table.num_rows and table.num_rows >= most:
            size = most or table.num_rows
            writer.write_table(table.slice(0, size).combine_chunks().replace_schema_metadata(writer.schema.metadata), size)
            table = table.slice(size)
        return [] if table is None else [table]

    def _read(self, number: int) -> tuple[pa.Table, list[dict[str, Any]]]:
        with pa.memory_map(str(self._path(number))) as file:
            table = pa.ipc.open_file(file).read_all()
        return table, json.loads(table.schema.metadata[REJECTED])

    def _path(self, number: int) -> Path:
        return self._folder / f"{number:08d}.arrow"
