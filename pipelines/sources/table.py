"""Records listed in a Parquet, CSV or JSON-lines table, one row each."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from functools import partial
from hashlib import sha256
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.json
from numpy.typing import NDArray

from pipelines.columns import ColumnRecords, ImageColumn
from pipelines.hashing import Int64s
from pipelines.records import MAX_NEGATIVES, ImageFile, Listing, LocalFile
from pipelines.remote import is_url
from pipelines.sources.cells import CellColumn, holds_bytes, open_table
from pipelines.sources.lists import ListColumn, holds_numbers, holds_targets, require_images
from pipelines.urls import UrlFile, opened, stamp

TABLE_SUFFIXES = (".parquet", ".csv", ".jsonl", ".ndjson")
NEGATIVES = ("negative", *(f"negative{i}" for i in range(MAX_NEGATIVES)))
NEEDED = {
    "pair": ("anchor", "positive"),
    "labelled_pair": ("left", "right", "match"),
    "triplet": ("anchor", "positive"),
    "labelled": ("image", "label"),
}
NO_IMAGES = ("label", "match", "group", "weight")
MATCH = {"1": 1, "true": 1, "1.0": 1, "0": 0, "false": 0, "0.0": 0}


def is_table(source: str) -> bool:
    return suffix_of(source) in TABLE_SUFFIXES


def suffix_of(source: str) -> str:
    """The suffix of a path or URL, e.g. `.csv`."""
    return Path(urlsplit(source).path if is_url(source) else source).suffix


def kind_of_table(source: str) -> str:
    """The kind of records that a table's columns tell of. Raises ValueError when they tell of none."""
    columns = _column_names(source)
    for kind in ("triplet", "pair", "labelled_pair", "labelled"):
        needed = {name for name in NEEDED[kind] if name not in NO_IMAGES}
        if needed <= {*columns} and (kind != "triplet" or not {*NEGATIVES}.isdisjoint(columns)):
            return kind
    raise ValueError(f"{source!r} has neither a column image nor anchor and positive nor left and right: {', '.join(columns)}")


def list_table(source: str | Path, kind: str, *, images_only: bool = False) -> Listing:
    """Every row of the table, a path or URL, as a record of `kind`. `images_only`: other columns need not be there.

    Image columns hold paths relative to the table's folder, URLs, or bytes (Parquet; also as the struct {bytes, path}); unless
    the data is labelled, also vectors: paths to `.npy` files, or lists of numbers. A column `target` of either is every
    record's target; one that holds something else is not looked at.
    Raises ValueError when the file cannot be read as a table, columns are missing, or a row lacks a value.
    """
    source = str(source)
    table, cells, have = _read(source, kind)
    needed = [name for name in NEEDED[kind] if not (images_only and name in NO_IMAGES)]
    negatives = [name for name in NEGATIVES if name in have] if kind == "triplet" else []
    missing = [name for name in needed if name not in have]
    if kind == "triplet" and not negatives:
        missing.append("negative")
    if missing:
        raise ValueError(f"{source!r} has no column {', '.join(missing)}, needed for {kind!r}; it has {', '.join(have)}")
    if not table.num_rows:
        raise ValueError(f"{source!r} has no rows")
    images = [name for name in (*NEEDED[kind], *negatives) if name not in NO_IMAGES]
    targets = ["target"] if "target" in cells or holds_targets(table) else []
    columns = {name: cells.get(name) or _column(source, name, table[name]) for name in (*images, *targets)}
    require_images(source, kind, {name: columns[name] for name in images})
    _require_values(source, table, needed, {name: column.present for name, column in columns.items()})
    make = partial(
        ColumnRecords,
        table.num_rows,
        entities=_entities(table, "label" if kind == "labelled" else "group"),
        match=_match(source, table["match"]) if "match" in needed else None,
        weight=_weight(source, table["weight"]) if "weight" in table.column_names else None,
    )

    def records(columns: Mapping[str, ImageColumn]) -> ColumnRecords:
        return make([columns[name] for name in images], target=columns.get("target"))

    def stage(folder: Path) -> ColumnRecords:
        return records({name: one.stage(folder) if isinstance(one, CellColumn) else one for name, one in columns.items()})

    sizes = np.stack([column.sizes for column in columns.values()], axis=1)
    stamps = [_stamp(source), *(column.stamp for column in columns.values() if isinstance(column, _PathColumn))]
    return Listing(
        records(columns),
        nbytes=int(np.maximum(sizes, 0).sum()),
        sizes=sizes,
        stamp=sha256(" ".join(stamps).encode()).hexdigest(),
        stage=stage if cells else None,
    )


class _PathColumn:
    """The images whose paths or URLs lie in one column: row -> image.

    `present` [n]; `dim` 0; `sizes` [n] bytes, 0 where there is no file, -1 at a URL; `stamp` differs once a local
    file has changed.
    """

    def __init__(self, source: str, name: str, column: pa.ChunkedArray) -> None:
        kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
        if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_null(kind)):
            raise ValueError(_explain_type(source, name, column))
        self._paths = column.cast(pa.large_string()).combine_chunks()
        self._folder = source.rpartition("/")[0] if is_url(source) else Path(source).parent
        self.present: NDArray[np.bool_] = pc.not_equal(self._paths, "").fill_null(False).to_numpy(False)
        self.sizes: Int64s = np.zeros(len(self._paths), np.int64)
        digest = sha256()
        for row in np.flatnonzero(self.present).tolist():
            image = self(row)
            self.sizes[row], changed = _size_and_time(image) if isinstance(image, LocalFile) else (-1, 0)
            digest.update(b"%d %d\n" % (self.sizes[row], changed))
        self.stamp, self.dim = digest.hexdigest(), 0

    def __call__(self, row: int) -> ImageFile | None:
        if not self.present[row]:
            return None
        path = self._paths[row].as_py()
        if is_url(path):
            return UrlFile(path, path)
        if isinstance(self._folder, Path) or os.path.isabs(path):
            return LocalFile(Path(self._folder, path), path)
        return UrlFile(f"{self._folder}/{path}", path)


def _size_and_time(image: LocalFile) -> tuple[int, int]:
    try:
        about = os.stat(image.path)
    except OSError:  # it will be listed when it is read
        return 0, 0
    return about.st_size, about.st_mtime_ns


def _read(source: str, kind: str) -> tuple[pa.Table, dict[str, CellColumn], list[str]]:
    """The table without its image bytes, the columns that hold those, and the names of all columns."""
    if not is_url(source) and not os.path.isfile(source):
        raise ValueError(f"no file {source!r}")
    wanted = {*NEEDED[kind], *NO_IMAGES, "target", *(NEGATIVES if kind == "triplet" else ())}
    suffix = suffix_of(source)
    try:
        if suffix == ".parquet":
            with open_table(source) as file:
                schema = file.schema_arrow
                names = [name for name in schema.names if name in wanted]
                types = {name: schema.field(name).type for name in names if name not in NO_IMAGES}
                cells = [name for name, of in types.items() if holds_numbers(of) or (holds_bytes(of) and name != "target")]
                table = file.read([name for name in names if name not in cells])
            return table, {name: CellColumn(source, name) for name in cells}, schema.names
        with opened(source) if is_url(source) else open(source, "rb") as file:
            if suffix == ".csv":
                text = {name: pa.string() for names in NEEDED.values() for name in (*names, *NEGATIVES, "group", "target")}
                options = pyarrow.csv.ConvertOptions(column_types=text)
                table = pyarrow.csv.read_csv(file, convert_options=options)
            else:
                table = pyarrow.json.read_json(file)
    except (pa.ArrowInvalid, pa.ArrowKeyError) as error:
        raise ValueError(f"{source!r} cannot be read as a {suffix} table: {str(error).splitlines()[0]}") from error
    return table, {}, table.column_names


def _column_names(source: str) -> list[str]:
    if not is_url(source) and not os.path.isfile(source):
        raise ValueError(f"no file {source!r}")
    suffix = suffix_of(source)
    try:
        if suffix == ".parquet":
            with open_table(source) as file:
                return list(file.schema_arrow.names)
        with opened(source) if is_url(source) else open(source, "rb") as file:
            if suffix == ".csv":
                return list(pyarrow.csv.open_csv(file).schema.names)
            return list(json.loads(file.readline()))
    except (pa.ArrowInvalid, ValueError) as error:
        raise ValueError(f"{source!r} cannot be read as a {suffix} table: {str(error).splitlines()[0]}") from error


def _column(source: str, name: str, column: pa.ChunkedArray) -> ListColumn | _PathColumn:
    return ListColumn(source, name, column) if holds_numbers(column.type) else _PathColumn(source, name, column)


def _require_values(source: str, table: pa.Table, needed: list[str], present: dict[str, NDArray[np.bool_]]) -> None:
    empty = {name: ~present[name] for name in (*needed, "target") if name in present}
    for name in ("label", "match"):
        if name in needed:
            filled = pc.not_equal(pc.cast(table[name], pa.string()), "").fill_null(False)
            empty[name] = ~filled.to_numpy().astype(bool)
    if not {*NEGATIVES}.isdisjoint(present):
        empty["negative"] = ~np.any([there for name, there in present.items() if name in NEGATIVES], axis=0)
    rows = np.flatnonzero(np.any(list(empty.values()), axis=0))
    if len(rows):
        row = int(rows[0])
        raise ValueError(f"{source!r}, row {row}: no {', '.join(name for name, missing in empty.items() if missing[row])}")


def _entities(table: pa.Table, name: str) -> pa.DictionaryArray | None:
    """The column as text; an empty cell is none."""
    if name not in table.column_names:
        return None
    column = table[name].combine_chunks()
    encoded = column if pa.types.is_dictionary(column.type) else column.dictionary_encode()
    names = [None if value in (None, "") else str(value) for value in encoded.dictionary.to_pylist()]
    text = pa.array(names, pa.large_string()).take(encoded.indices)
    return text.dictionary_encode()


def _match(source: str, column: pa.ChunkedArray) -> NDArray[np.int8]:
    encoded = column.combine_chunks().dictionary_encode()
    values = encoded.dictionary.to_pylist()
    known = np.asarray([MATCH.get(str(value).strip().lower(), -1) for value in values], dtype=np.int8)
    match = known[encoded.indices.to_numpy(False)]
    if (match < 0).any():
        row = int(np.flatnonzero(match < 0)[0])
        raise ValueError(f"{source!r}, row {row}: match must be 0 or 1, got {column[row].as_py()!r}")
    return np.asarray(match, dtype=np.int8)


def _weight(source: str, column: pa.ChunkedArray) -> NDArray[np.float64]:
    kind = column.type
    if pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_null(kind):
        weight: NDArray[np.float64] = column.cast(pa.float64()).fill_null(1.0).to_numpy()
    else:
        weight = np.full(len(column), np.nan)
    wrong = np.flatnonzero(~((weight >= 0.0) & np.isfinite(weight)))
    if len(wrong):
        row = int(wrong[0])
        raise ValueError(f"{source!r}, row {row}: weight must be a number from 0 on, got {column[row].as_py()!r}")
    return weight


def _stamp(source: str) -> str:
    if is_url(source):
        return stamp(source)
    about = os.stat(source)
    return f"{about.st_size} {about.st_mtime_ns}"


def _explain_type(source: str, name: str, column: pa.ChunkedArray) -> str:
    value = next((value.as_py() for chunk in column.chunks for value in chunk.drop_null()), None)
    return f"column {name} of {source!r} must hold paths, image bytes or vectors, not {type(value).__name__} {value!r:.40}"
