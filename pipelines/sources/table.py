"""Records listed in a Parquet, CSV or JSON-lines table, one row each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet

from pipelines.records import MAX_NEGATIVES, ImageFile, Listing, LocalFile, Record

TABLE_SUFFIXES = (".parquet", ".csv", ".jsonl", ".ndjson")
NEGATIVES = ("negative", *(f"negative{i}" for i in range(MAX_NEGATIVES)))
NEEDED = {
    "pair": ("anchor", "positive"),
    "labelled_pair": ("left", "right", "match"),
    "triplet": ("anchor", "positive"),
    "labelled": ("image", "label"),
}
MATCH = {"1": 1, "true": 1, "1.0": 1, "0": 0, "false": 0, "0.0": 0}


@dataclass(frozen=True, slots=True)
class CellImage:
    """An image whose bytes lie in a cell of the table."""

    column: pa.ChunkedArray
    row: int
    name: str

    def read(self) -> bytes:
        value = self.column[self.row].as_py()
        return bytes(value["bytes"] if isinstance(value, dict) else value)


Cell = Callable[[int], ImageFile | None]


def list_table(path: Path, kind: str) -> Listing:
    """Every row of the table as a record of `kind`.

    Image columns hold paths relative to the table's folder, or bytes (Parquet; also as the struct {bytes, path}).
    Raises ValueError when the file cannot be read as a table, columns are missing, or a row lacks a value.
    """
    table = _read(path)
    missing = [column for column in NEEDED[kind] if column not in table.column_names]
    negatives = [name for name in NEGATIVES if name in table.column_names] if kind == "triplet" else []
    if kind == "triplet" and not negatives:
        missing.append("negative")
    if missing:
        raise ValueError(
            f"{str(path)!r} has no column {', '.join(missing)}, needed for {kind!r}; it has {', '.join(table.column_names)}"
        )
    images = [column for column in NEEDED[kind] if column not in ("match", "label")]
    cells = {column: _image_cells(table, column, path) for column in (*images, *negatives)}
    values = {name: table[name].to_pylist() for name in ("label", "match", "group", "weight") if name in table.column_names}
    records = [_record(kind, path, row, images, negatives, cells, values) for row in range(table.num_rows)]
    if not records:
        raise ValueError(f"{str(path)!r} has no rows")
    return Listing(records, nbytes=sum(table[column].nbytes for column in cells))


def _read(path: Path) -> pa.Table:
    if not path.is_file():
        raise ValueError(f"no file {str(path)!r}")
    try:
        if path.suffix == ".parquet":
            return pyarrow.parquet.read_table(path)
        if path.suffix == ".csv":
            text = {name: pa.string() for names in NEEDED.values() for name in (*names, *NEGATIVES, "group")}
            return pyarrow.csv.read_csv(path, convert_options=pyarrow.csv.ConvertOptions(column_types=text))
        return pyarrow.json.read_json(path)
    except (pa.ArrowInvalid, pa.ArrowKeyError) as error:
        raise ValueError(f"{str(path)!r} cannot be read as a {path.suffix} table: {str(error).splitlines()[0]}") from error


def _image_cells(table: pa.Table, name: str, path: Path) -> Cell:
    column, kind = table[name], table.schema.field(name).type
    has_bytes = pa.types.is_struct(kind) and "bytes" in [field.name for field in kind]
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or has_bytes:

        def cell(row: int) -> ImageFile | None:
            value = column[row]
            missing = value["bytes"].as_py() is None if has_bytes and value.is_valid else not value.is_valid
            return None if missing else CellImage(column, row, f"{path.name}:{row}:{name}")

        return cell
    paths = column.to_pylist()
    wrong = next((value for value in paths if value is not None and not isinstance(value, str)), None)
    if wrong is not None:
        raise ValueError(
            f"column {name} of {str(path)!r} must hold paths or image bytes, not {type(wrong).__name__} {wrong!r:.40}"
        )
    return lambda row: LocalFile(path.parent / paths[row], paths[row]) if paths[row] else None


def _record(
    kind: str,
    path: Path,
    row: int,
    images: list[str],
    negatives: list[str],
    cells: dict[str, Cell],
    values: dict[str, list[Any]],
) -> Record:
    needed = {column: cells[column](row) for column in images}
    extra = [image for column in negatives if (image := cells[column](row)) is not None]
    known = {name: column[row] for name, column in values.items()}
    empty = [name for name, value in needed.items() if value is None]
    empty += [name for name in NEEDED[kind] if name in known and known[name] in (None, "")]
    if kind == "triplet" and not extra:
        empty.append("negative")
    if empty:
        raise ValueError(f"{str(path)!r}, row {row}: no {', '.join(empty)}")
    entity = known.get("label") if kind == "labelled" else known.get("group")
    weight = 1.0 if known.get("weight") is None else known["weight"]
    if not isinstance(weight, (int, float)) or not 0.0 <= weight < float("inf"):
        raise ValueError(f"{str(path)!r}, row {row}: weight must be a number from 0 on, got {weight!r}")
    present = [image for image in needed.values() if image is not None]
    match = _match(known["match"], path, row) if kind == "labelled_pair" else None
    return Record((*present, *extra), None if entity is None else str(entity), match=match, weight=float(weight))


def _match(value: object, path: Path, row: int) -> int:
    text = str(value).strip().lower()
    if text not in MATCH:
        raise ValueError(f"{str(path)!r}, row {row}: match must be 0 or 1, got {value!r}")
    return MATCH[text]
