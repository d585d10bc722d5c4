"""Image bytes, or lists of numbers, in the cells of a Parquet table, which may be far larger than memory."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet
from numpy.typing import NDArray

from pipelines.hashing import Int64s
from pipelines.records import ImageFile
from pipelines.remote import is_url
from pipelines.sources.lists import as_npy, first_length, holds_numbers
from pipelines.urls import opened

BATCH_ROWS = 256


@dataclass(frozen=True, slots=True)
class CellImage:
    """An image or a vector in a cell; quick when read in the order of the rows."""

    table: str
    column: str
    group: int  # row group of the file
    row: int  # in that group
    name: str

    def read(self) -> bytes:
        return bytes(_group(self.table, self.column, self.group)[self.row].as_py())


@dataclass(frozen=True, slots=True)
class FileRange:
    """An image in the middle of a file."""

    path: Path
    offset: int
    nbytes: int
    name: str

    def read(self) -> bytes:
        with self.path.open("rb") as file:
            file.seek(self.offset)
            data = file.read(self.nbytes)
        if len(data) != self.nbytes:
            raise OSError(f"{str(self.path)!r} ends early")
        return data


class CellColumn:
    """The images of one column: row -> image. `present` [n], `sizes` [n] bytes; lists of `dim` numbers are `.npy` files."""

    def __init__(self, table: str, column: str) -> None:
        """Reads the column once, a few rows at a time. Raises ValueError naming a row whose list is no vector."""
        self.dim = 0  # numbers of the vectors; bytes have none
        self._table, self._column = table, column
        with open_table(table) as file:
            about = file.metadata
            counts = [about.row_group(group).num_rows for group in range(about.num_row_groups)]
            lengths = [pc.binary_length(cells).fill_null(-1).to_numpy(False) for cells in self._batches(file)]
        self._starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        known = np.concatenate([np.zeros(0, np.int64), *lengths]).astype(np.int64)
        self.present: NDArray[np.bool_] = known >= 0
        self.sizes: Int64s = np.maximum(known, 0)

    def __call__(self, row: int) -> ImageFile | None:
        if not self.present[row]:
            return None
        group = int(np.searchsorted(self._starts, row, side="right")) - 1
        return CellImage(self._table, self._column, group, row - int(self._starts[group]), self._name(row))

    def stage(self, folder: Path) -> Callable[[int], ImageFile | None]:
        """Copy the images into a file in `folder`, where any order is quick to read; what is there is not copied again."""
        path = folder / f"{self._column}.cells"
        if not path.is_file():
            temporary = path.with_suffix(".tmp")
            with open_table(self._table) as table, temporary.open("wb") as file:
                for cells in self._batches(table):
                    file.writelines(cells.drop_null().to_pylist())
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        ends = np.cumsum(self.sizes)

        def staged(row: int) -> ImageFile | None:
            size = int(self.sizes[row])
            return FileRange(path, int(ends[row]) - size, size, self._name(row)) if self.present[row] else None

        return staged

    def _batches(self, file: pyarrow.parquet.ParquetFile) -> Iterator[pa.Array]:
        row = 0
        for batch in file.iter_batches(BATCH_ROWS, columns=[self._column]):
            cells = batch.column(0)
            if holds_numbers(cells.type):
                self.dim = self.dim or first_length(cells)
                yield as_npy(cells, self.dim, row, f"{self._table!r}, column {self._column}")
            else:
                yield _bytes_of(cells)
            row += len(cells)

    def _name(self, row: int) -> str:
        return f"{os.path.basename(self._table)}:{row}:{self._column}"


def holds_bytes(kind: pa.DataType) -> bool:
    """Whether cells of this type are image files: bytes, or the struct {bytes, path}."""
    in_struct = pa.types.is_struct(kind) and "bytes" in [field.name for field in kind]
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or in_struct)


@contextmanager
def open_table(table: str) -> Iterator[pyarrow.parquet.ParquetFile]:
    """A Parquet file on this machine or at a URL."""
    with opened(table) if is_url(table) else open(table, "rb") as file, pyarrow.parquet.ParquetFile(file) as parquet:
        yield parquet


def _bytes_of(cells: pa.Array) -> pa.Array:
    if holds_numbers(cells.type):
        return as_npy(cells, first_length(cells), 0, "cells")
    return pc.struct_field(cells, "bytes") if pa.types.is_struct(cells.type) else cells


@lru_cache(maxsize=4)
def _group(table: str, column: str, group: int) -> pa.ChunkedArray:
    with open_table(table) as file:
        return pa.chunked_array([_bytes_of(chunk) for chunk in file.read_row_group(group, columns=[column])[column].chunks])
