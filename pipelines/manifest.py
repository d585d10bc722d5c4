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

from configs.errors import Unrecoverable
from pipelines.hashing import Int64s
from pipelines.remote import fetch_whole, is_url, join
from pipelines.samples import ShardTable, read_table
from pipelines.tables import Tables

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


@dataclass(frozen=True, slots=True)
class ShardFile:
    """One tar file: a path or a URL, its size and its hash when it was packed."""

    location: str
    nbytes: int
    sha256: str
    decoded: bool = False  # whether all of its images were decoded when it was packed, so that their CRC vouches for them

    @property
    def remote(self) -> bool:
        return is_url(self.location)

    @property
    def name(self) -> str:
        return self.location.rpartition("/")[2]


class Manifest:
    """A data set in a folder or behind a URL. Small tables are read at once, the samples of a shard when they are asked for.

    Attributes: `location` path or URL, `kind`, `digest`, `num_samples`, `sizes` [M] records per shard, `starts` [M + 1]
    their prefix sums, `nbytes` [M] size of each shard file.
    Safe to use from several threads.
    """

    def __init__(self, location: str, about: dict[str, Any], shards: pa.Table, files: Tables | None = None) -> None:
        self.location = location
        self._files = files or Tables(location, None)
        self.kind: str = about["kind"]
        self.digest: str = about["digest"]
        self.made_by: str = about.get("made_by", "pack")  # or "index", over tars that somebody else wrote
        self.num_samples: int = about["num_samples"]
        self.num_images: int = about["num_images"]
        self.num_classes: int = about["num_classes"]
        self.weighted: bool = about["weighted"]  # whether any record has a weight other than 1
        self.vector_dim: int = about.get("vector_dim", 0)  # numbers of the vectors among its images; 0: there are none
        self.target_dim: int = about.get("target_dim", 0)  # numbers of the target that every record has; 0: none has
        self.has_vectors = self.vector_dim + self.target_dim > 0  # whether not all members are images
        self.sizes: Int64s = shards["num_samples"].to_numpy().astype(np.int64)
        self.starts: Int64s = np.concatenate([[0], np.cumsum(self.sizes)]).astype(np.int64)
        self.numbers: Int64s = self.starts[:-1]  # of each shard's first record, for what is drawn for a record
        self.nbytes: Int64s = shards["nbytes"].to_numpy().astype(np.int64)
        self._shards = shards
        self._shard_files: dict[int, ShardFile] = {}
        self._tables: OrderedDict[int, ShardTable] = OrderedDict()
        self._cached_images = 0
        self._lock = threading.Lock()

    @classmethod
    def open(cls, location: str | Path, *, cache: str | None = None) -> Manifest:
        """Read the manifest of the data set in a folder or behind a URL that fsspec opens (`s3://`, `https://`, ...).

        Tables of a remote one are fetched into the folder `cache` (`data.cache`) when they are needed.
        Raises ValueError when there is none, or when its version or its digest is not what it should be; RuntimeError when a
        server does not answer.
        """
        location = str(location).removeprefix("file://")
        location = location if is_url(location) else str(Path(location))
        about = _read_about(location)
        tables = Tables(location, cache)
        file = tables.path("shards.parquet")
        try:
            shards = pyarrow.parquet.read_table(file)
        except (OSError, pa.ArrowException) as error:
            raise ValueError(f"{join(location, file.name)!r} cannot be read: {error}; pack the data again") from error
        seen = digest_of(about["kind"], shards)
        if seen != about["digest"]:
            wanted = str(about["digest"])
            raise ValueError(f"{location!r} does not match its digest ({seen[:12]}, not {wanted[:12]}); pack the data again")
        return cls(location, about, shards, tables)

    @property
    def path(self) -> Path:
        """The folder. Raises ValueError when the data set is remote."""
        if is_url(self.location):
            raise ValueError(f"{self.location} is remote, and this needs a folder of this machine; copy it here first")
        return Path(self.location)

    def shard_path(self, shard: int) -> Path:
        """The shard's file. Raises ValueError when it is remote."""
        file = self.shard_file(shard)
        if file.remote:
            raise ValueError(f"{file.location} is remote, and this needs a file of this machine; copy the data here first")
        return Path(file.location)

    def shard_file(self, shard: int) -> ShardFile:
        """Where the shard lies and what it was when it was packed."""
        if shard not in self._shard_files:
            url, nbytes, sha256 = (self._shards[name][shard].as_py() for name in ("url", "nbytes", "sha256"))
            location = join(self.location, url) if is_url(self.location) or is_url(url) else str(self.path / url)
            self._shard_files[shard] = ShardFile(location, nbytes, sha256, self.made_by == "pack")
        return self._shard_files[shard]

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
        table = pyarrow.parquet.read_table(self._files.path("runs.parquet"))
        return Runs(*(table[name].to_numpy().astype(np.int64, copy=False) for name in ("shard", "start", "length")))

    @cached_property
    def classes(self) -> Classes:
        """Class names and counts; empty unless the data is labelled."""
        table = pyarrow.parquet.read_table(self._files.path("classes.parquet"))
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
        return self._files.path(self._shards["samples"][shard].as_py()), int(self._shards["row_group"][shard].as_py())


def digest_of(kind: str, shards: pa.Table) -> str:
    """What the data set contains, whatever its files are called: kind, and size and hash of each shard in order."""
    digest = hashlib.sha256(f"{FORMAT} {VERSION} {kind}\n".encode())
    for size, sha256 in zip(shards["num_samples"].to_pylist(), shards["sha256"].to_pylist(), strict=True):
        digest.update(f"{size} {sha256}\n".encode())
    return digest.hexdigest()


def _read_about(location: str) -> dict[str, Any]:
    file = join(location, "manifest.json")
    text = _read(location, file)
    try:
        about: dict[str, Any] = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{file!r} is damaged ({error}); pack the data again") from error
    if about.get("format") != FORMAT or about.get("version") != VERSION:
        seen = f"{about.get('format')} version {about.get('version')}"
        raise ValueError(f"{file!r} is {seen}; this program reads {FORMAT} version {VERSION}")
    return about


def _read(location: str, file: str) -> bytes:
    if not is_url(location):
        if not Path(file).is_file():
            raise ValueError(_explain_missing(Path(location)))
        return Path(file).read_bytes()
    try:
        return fetch_whole(file)
    except Unrecoverable as error:
        raise ValueError(f"no manifest.json at {location}, so it holds no shards; make them with `nearfar pack`") from error


def _explain_missing(path: Path) -> str:
    if not path.is_dir():
        return f"no folder {str(path)!r}; make shards with `nearfar pack SOURCE {path}`"
    inner = sorted(entry.name for entry in path.iterdir() if (entry / "manifest.json").is_file())
    if inner:
        return f"no manifest.json in {str(path)!r}; did you mean {' or '.join(str(path / name) for name in inner)}?"
    return f"no manifest.json in {str(path)!r}, so it holds no shards; make them with `nearfar pack {path} OUT`"
