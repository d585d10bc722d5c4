"""Records kept as columns: tens of bytes each, so that ten million of them fit into memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipelines.hashing import Int64s
from pipelines.records import ImageFile, Record, Records

ImageColumn = Callable[[int], "ImageFile | None"]  # row -> its image; None where there is none


class ColumnRecords:
    """n records, each made when it is asked for.

    `entities` is a dictionary array [n] of strings; `match` [n] and `weight` [n] as in Record.
    """

    def __init__(
        self,
        count: int,
        images: Sequence[ImageColumn],
        *,
        entities: pa.DictionaryArray | None = None,
        match: NDArray[np.int8] | None = None,
        weight: NDArray[np.float64] | None = None,
        target: ImageColumn | None = None,
        negative_entities: Callable[[int], tuple[str, ...]] | None = None,
    ) -> None:
        self._count, self._images = count, images
        self._negative_entities = negative_entities
        self.entities = entities
        self._match, self._weight, self._target = match, weight, target

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int, /) -> Record:
        return Record(
            images=tuple(image for column in self._images if (image := column(index)) is not None),
            entity=None if self.entities is None else self.entities[index].as_py(),
            negative_entities=() if self._negative_entities is None else self._negative_entities(index),
            match=None if self._match is None else int(self._match[index]),
            weight=1.0 if self._weight is None else float(self._weight[index]),
            target=None if self._target is None else self._target(index),
        )

    def __iter__(self) -> Iterator[Record]:
        return map(self.__getitem__, range(self._count))


def entity_column(records: Records) -> pa.DictionaryArray:
    """The entity of every record, null where there is none.  [n]"""
    if isinstance(records, ColumnRecords):
        if records.entities is not None:
            return records.entities
        return pa.nulls(len(records), pa.large_string()).dictionary_encode()
    return pa.array((record.entity for record in records), pa.large_string()).dictionary_encode()


def entity_names(records: Records) -> list[str]:
    """All different entities, sorted."""
    column = entity_column(records)
    return sorted(set(column.dictionary.take(column.indices.unique().drop_null()).to_pylist()))


def entity_numbers(records: Records) -> Int64s:
    """Number the entities in the order of their names; a record without one is an entity of its own and comes first.  [n]"""
    column = entity_column(records)
    names: list[str] = column.dictionary.to_pylist()
    rank = {name: number for number, name in enumerate(sorted(set(names)))}
    codes = column.indices.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int64)
    missing = np.flatnonzero(codes < 0)
    ranks = np.asarray([rank[name] for name in names] or [0], dtype=np.int64)
    numbers = len(missing) + ranks[np.maximum(codes, 0)]
    digits = missing.astype(f"S{len(str(len(codes)))}")  # sorted as text, as names are
    numbers[missing[np.argsort(digits, kind="stable")]] = np.arange(len(missing))
    return np.asarray(numbers, dtype=np.int64)
