"""Vectors in the cells of a table: lists of numbers, turned into the bytes of `.npy` files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipelines.hashing import Int64s
from pipelines.records import ImageFile
from pipelines.vectors import encode_vectors


@dataclass(frozen=True, slots=True)
class MemoryFile:
    """Bytes that are in memory already."""

    name: str
    data: bytes

    def read(self) -> bytes:
        return self.data


class ListColumn:
    """The vectors of a column in memory: row -> `.npy` file. `present` [n], `sizes` [n] bytes, `dim` numbers in each."""

    def __init__(self, table: str, name: str, column: pa.ChunkedArray) -> None:
        """Raises ValueError naming the row that is no vector, or not as long as those before it."""
        self._table, self._name = table, name
        cells = column.combine_chunks()
        self.dim = first_length(cells)
        self._cells = as_npy(cells, self.dim, 0, f"{table!r}, column {name}")
        self.present: NDArray[np.bool_] = self._cells.is_valid().to_numpy(False)
        self.sizes: Int64s = pc.binary_length(self._cells).fill_null(0).to_numpy(False).astype(np.int64)

    def __call__(self, row: int) -> ImageFile | None:
        return MemoryFile(f"{self._table}:{row}:{self._name}", self._cells[row].as_py()) if self.present[row] else None


class Column(Protocol):
    """Images or vectors, one a row: `dim` numbers in each, 0 for images."""

    @property
    def present(self) -> NDArray[np.bool_]: ...  # [n]

    @property
    def dim(self) -> int: ...


def require_images(source: str, kind: str, columns: Mapping[str, Column]) -> None:
    """Raise ValueError unless every record has an image beside its vectors, and these are of one length."""
    dims = {name: column.dim for name, column in columns.items() if column.dim}
    if not dims:
        return
    if len(set(dims.values())) > 1:
        told = ", ".join(f"{name} {dim}" for name, dim in dims.items())
        raise ValueError(f"the lists of {source!r} must be of one length, but they are not: {told}")
    images = [column.present for column in columns.values() if not column.dim]
    without = np.flatnonzero(~np.any(images, axis=0)) if images else [0]
    if len(without):
        told = "labelled images cannot be vectors" if kind == "labelled" else "every record needs an image, too"
        raise ValueError(f"{source!r}, row {int(without[0])}: only vectors in {', '.join(dims)}; {told}")


def holds_targets(table: pa.Table) -> bool:
    """Whether the column `target` holds vectors: many tables have one with something else in it."""
    if "target" not in table.column_names:
        return False
    column = table["target"]
    first = next((value for chunk in column.chunks for value in chunk.drop_null()), None)
    return holds_numbers(column.type) or str(first).lower().endswith(".npy")


def holds_numbers(kind: pa.DataType) -> bool:
    """Whether cells of this type are lists of numbers."""
    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    if not is_list:
        return False
    # Lists without any number are told apart by their type, null, and refused by row.
    return any(test(kind.value_type) for test in (pa.types.is_floating, pa.types.is_integer, pa.types.is_null))


def first_length(cells: pa.Array) -> int:
    """Numbers in the first cell that holds any list; 0 when none does."""
    lengths = pc.list_value_length(cells).drop_null()
    return int(lengths[0].as_py()) if len(lengths) else 0


def as_npy(cells: pa.Array, dim: int, first_row: int, where: str) -> pa.LargeBinaryArray:
    """Lists of `dim` numbers as `.npy` files of float32, null where there is no list.  [n] -> [n]

    Raises ValueError naming the row, counted from `first_row`, that is not of `dim` finite numbers.
    """
    valid = cells.is_valid().to_numpy(False)
    there = np.flatnonzero(valid)
    lengths = pc.list_value_length(cells).drop_null().to_numpy(False)
    _refuse(there[(lengths != dim) | (lengths == 0)], cells, first_row, where, f"a list of {dim or 'one or more'} numbers")
    numbers = pc.list_flatten(cells)  # [p * dim]
    with np.errstate(over="ignore", invalid="ignore"):
        vectors = numbers.to_numpy(zero_copy_only=False).astype(np.float32).reshape(len(there), dim)
    _refuse(there[~np.isfinite(vectors).all(axis=1)], cells, first_row, where, "finite numbers in float32")
    files = encode_vectors(vectors)  # [p, bytes]
    ends = np.arange(len(files) + 1, dtype=np.int64) * files.shape[1]
    dense = pa.LargeBinaryArray.from_buffers(pa.large_binary(), len(files), [None, pa.py_buffer(ends), pa.py_buffer(files)])
    return dense if valid.all() else dense.take(pa.array(np.cumsum(valid) - 1, mask=~valid))


def _refuse(wrong: Int64s, cells: pa.Array, first_row: int, where: str, wanted: str) -> None:
    if len(wrong):
        value = cells[int(wrong[0])].as_py()
        raise ValueError(f"{where}, row {first_row + int(wrong[0])}: expected {wanted}, got {len(value)}: {str(value)[:60]}")
