"""A file of vectors by class or by image: text embeddings, a teacher's, or what `nearfar embed` wrote."""

from __future__ import annotations

import os
from collections.abc import Container, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.json
import pyarrow.parquet
from numpy.typing import NDArray

from pipelines.hashing import Int64s
from pipelines.sources.lists import as_npy, first_length, holds_numbers
from pipelines.vectors import decode_vector

SHOWN = 3  # names in a message


@dataclass(frozen=True, slots=True)
class GivenVectors:
    """`vectors` [n, E] with their `names` [n], labels or keys of images; `categories` [n] where the file has them."""

    path: str
    by: str  # label or key
    names: list[str]
    vectors: NDArray[np.float32]
    categories: list[str] | None
    stamp: str

    def of_images(self, names: Sequence[str], labels: Sequence[str]) -> Int64s:
        """The row of each image, by its key or by its label; -1 where there is none.  [m]

        Raises ValueError when most of them have none.
        """
        row = {name: number for number, name in enumerate(self.names)}
        wanted = labels if self.by == "label" else [_key_of(name, row) for name in names]
        rows = np.asarray([row.get(name, -1) for name in wanted], np.int64)
        missing = np.flatnonzero(rows < 0)
        if 2 * len(missing) > len(rows):
            first = list(dict.fromkeys(wanted[int(index)] for index in missing))[:SHOWN]
            shown = ", ".join(repr(name) for name in first)
            raise ValueError(
                f"{self.path!r} has no vector for {len(missing)} of {len(rows)} images, by {self.by}: {shown}, ..."
            )
        return rows


def _key_of(name: str, known: Container[str]) -> str:
    """The key of an image: what it is called, or in a tar the member's name without its suffixes."""
    _, inside, member = name.partition(".tar/")
    if name in known or not inside:
        return name
    folder, slash, file = member.rpartition("/")
    return f"{folder}{slash}{file.partition('.')[0]}"


def read_vectors(path: str) -> GivenVectors:
    """Columns `embedding` and `key`, or `label` without it, of a parquet or JSONL file; `category` if there is one.

    Raises ValueError when there is no such file, column or number.
    """
    if not os.path.isfile(path):
        raise ValueError(f"no file {path!r}; make one with `nearfar text` or `nearfar embed`")
    try:
        table = pyarrow.parquet.read_table(path) if path.endswith(".parquet") else pyarrow.json.read_json(path)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path!r} is no parquet or JSONL file: {str(error).splitlines()[0]}") from error
    by = next((name for name in ("key", "label") if name in table.column_names), None)
    if by is None or "embedding" not in table.column_names or not holds_numbers(table["embedding"].type):
        raise ValueError(f"{path!r} needs columns embedding (lists of numbers) and label or key; it has {table.column_names}")
    cells = table["embedding"].combine_chunks()
    files = as_npy(cells, first_length(cells), 0, f"{path!r}, column embedding")
    if files.null_count:
        raise ValueError(f"{path!r}: {files.null_count} rows have no vector")
    names = pc.cast(table[by], pa.string()).to_pylist()
    if len(set(names)) < len(names):
        twice = next(name for number, name in enumerate(names) if name in names[:number])
        raise ValueError(f"{path!r}: the {by} {twice!r} is there twice")
    categories = pc.cast(table["category"], pa.string()).to_pylist() if "category" in table.column_names else None
    vectors = np.stack([decode_vector(file.as_py()) for file in files]) if len(files) else np.zeros((0, 1), np.float32)
    return GivenVectors(path, by, names, vectors, categories, sha256(Path(path).read_bytes()).hexdigest())
