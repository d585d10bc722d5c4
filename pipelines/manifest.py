"""The index of a packed data set: which shards there are and where every image lies in them."""

from __future__ import annotations

import hashlib
import json
import threading
from collections import OrderedDict
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet

from pipelines.hashing import Int64s
from pipelines.samples import ShardTable, read_table

FORMAT, VERSION = "nearfar-shards", 1
ORDER_VERSION = 1
CACHED_IMAGES = 4_000_000  # of all tables kept in memory, about 60 bytes each


@dataclass(frozen=True, slots=True)
class Runs:
    """Stretches of rows of one class, in the order of the shards.  Each array [num_runs]"""

    shard: Int64s
    start: Int64s  # first row in the shard
    length: Int64s


@dataclass(frozen=True, slots=True)
class Classes:
    """The classes of labelled data, sorted by name."""

    names: list[str]
    groups: Int64s  # [C]
    counts: Int64s  # [C] images


class Manifest:
    """A data set on disk. Small tables are read at once, the samples of a shard when they are asked for.

    Attributes: `path`, `kind`, `digest`, `num_samples`, `sizes` [M] records per shard, `starts` [M + 1] their prefix sums,
    `nbytes` [M] size of each shard file.
    Safe to use from several threads.
    """

    def __init__(self, path: Path, about: dict[str, Any], shards: pa.Table) -> None:
        self.path = path
        self.kind: str = about["kind"]
        self.digest: str = about["digest"]
        self.made_by: str = about.get("made_by", "pack")  # or "index", over tars that somebody else wrote
        self.num_samples: int = about["num_samples"]
        self.num_images: int = about["num_images"]
        self.num_classes: int = about["num_classes"]
        self.weighted: bool = about["weighted"]  # whether any record has a weight other than 1
        self.sizes: Int64s = shards["num_samples"].to_numpy().astype(np.int64)
        self.starts: Int64s = np.concatenate([[0], np.cumsum(self.sizes)]).astype(np.int64)
        self.numbers: Int64s = self.starts[:-1]  # of each shard's first record, for what is drawn for a record
        self.nbytes: Int64s = shards["nbytes"].to_numpy().astype(np.int64)
        self._shards = shards
        self._tables: OrderedDict[int, ShardTable] = OrderedDict()
        self._cached_images = 0
        self._lock = threading.Lock()

    @classmethod
    def open(cls, path: str | Path) -> Manifest:
        """Read the manifest of the data set in the folder `path`.

        Raises ValueError when there is none, or when its version or its digest is not what it should be.
        """
        path = Path(path)
        about = _read_about(path)
        try:
            shards = pyarrow.parquet.read_table(path / "shards.parquet")
        except (OSError, pa.ArrowException) as error:
            raise ValueError(f"{str(path / 'shards.parquet')!r} cannot be read: {error}; pack the data again") from error
        seen = digest_of(about["kind"], shards)
        if seen != about["digest"]:
            wanted = str(about["digest"])
            raise ValueError(f"{str(path)!r} does not match its digest ({seen[:12]}, not {wanted[:12]}); pack the data again")
        return cls(path, about, shards)

    def shard_path(self, shard: int) -> Path:
        return self.path / str(self._shards["url"][shard].as_py())

    def sha256(self, shard: int) -> str:
        """Of the whole file of a shard, in hexadecimal."""
        return str(self._shards["sha256"][shard].as_py())

    def table(self, shard: int) -> ShardTable:
        """Where the images of a shard lie, kept for the next call. Raises RuntimeError when it cannot be read."""
        with self._lock:
            if shard in self._tables:
                self._tables.move_to_end(shard)
                return self._tables[shard]
        table = self._read_table(shard)
        with self._lock:
            if shard not in self._tables:
                self._tables[shard] = table
                self._cached_images += len(table.uid)
            while self._cached_images > CACHED_IMAGES and len(self._tables) > 1:
                self._cached_images -= len(self._tables.popitem(last=False)[1].uid)
        return table

    def digest_of_first(self, num_shards: int) -> str:
        """What `digest` would be if the data set ended after so many shards."""
        return digest_of(self.kind, self._shards.slice(0, num_shards))

    def keys(self, shard: int) -> list[str]:
        """The key of every record of a shard."""
        return self.column(shard, "key")

    def sources(self, shard: int) -> list[str]:
        """What every record of a shard was made from, e.g. the path of its (first) image in the packed folder."""
        return self.column(shard, "source")

    def column(self, shard: int, name: str) -> list[Any]:
        """One of RECORD_COLUMNS for every record of a shard. Raises RuntimeError when it cannot be read."""
        path, row_group = self._samples_at(shard)
        try:
            table = pyarrow.parquet.ParquetFile(path).read_row_group(row_group, columns=[name])
            return list(table[name].to_pylist())
        except (OSError, pa.ArrowException, IndexError) as error:
            raise RuntimeError(f"{str(path)!r} cannot be read: {error}; restore it or pack the data again") from error

    @cached_property
    def runs(self) -> Runs:
        """Runs of one class. Only labelled data has them."""
        table = pyarrow.parquet.read_table(self.path / "runs.parquet")
        return Runs(*(table[name].to_numpy().astype(np.int64, copy=False) for name in ("shard", "start", "length")))

    @cached_property
    def classes(self) -> Classes:
        """Class names and counts; empty unless the data is labelled."""
        table = pyarrow.parquet.read_table(self.path / "classes.parquet")
        return Classes(
            table["name"].to_pylist(), table["group"].to_numpy().astype(np.int64), table["count"].to_numpy().astype(np.int64)
        )

    @cached_property
    def class_names(self) -> dict[int, str]:
        """group -> class name."""
        return dict(zip(self.classes.groups.tolist(), self.classes.names, strict=True))

    @cached_property
    def class_counts(self) -> dict[int, int]:
        """group -> number of images."""
        return dict(zip(self.classes.groups.tolist(), self.classes.counts.tolist(), strict=True))

    def _read_table(self, shard: int) -> ShardTable:
        return read_table(*self._samples_at(shard))

    def _samples_at(self, shard: int) -> tuple[Path, int]:
        return self.path / self._shards["samples"][shard].as_py(), int(self._shards["row_group"][shard].as_py())


def digest_of(kind: str, shards: pa.Table) -> str:
    """What the data set contains, whatever its files are called: kind, and size and hash of each shard in order."""
    digest = hashlib.sha256(f"{FORMAT} {VERSION} {kind}\n".encode())
    for size, sha256 in zip(shards["num_samples"].to_pylist(), shards["sha256"].to_pylist(), strict=True):
        digest.update(f"{size} {sha256}\n".encode())
    return digest.hexdigest()


def _read_about(path: Path) -> dict[str, Any]:
    file = path / "manifest.json"
    if not file.is_file():
        raise ValueError(_explain_missing(path))
    try:
        about: dict[str, Any] = json.loads(file.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{str(file)!r} is damaged ({error}); pack the data again") from error
    if about.get("format") != FORMAT or about.get("version") != VERSION:
        seen = f"{about.get('format')} version {about.get('version')}"
        raise ValueError(f"{str(file)!r} is {seen}; this program reads {FORMAT} version {VERSION}")
    return about


def _explain_missing(path: Path) -> str:
    if not path.is_dir():
        return f"no folder {str(path)!r}; make shards with `nearfar pack SOURCE {path}`"
    inner = sorted(entry.name for entry in path.iterdir() if (entry / "manifest.json").is_file())
    if inner:
        return f"no manifest.json in {str(path)!r}; did you mean {' or '.join(str(path / name) for name in inner)}?"
    return f"no manifest.json in {str(path)!r}, so it holds no shards; make them with `nearfar pack {path} OUT`"
