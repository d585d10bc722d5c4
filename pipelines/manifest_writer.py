"""Writes the manifest of a data set, shard by shard, from the samples table of each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet

from pipelines.hashing import hash_entity
from pipelines.manifest import FORMAT, ORDER_VERSION, VERSION, digest_of
from pipelines.samples import SCHEMA, SHARDS_SCHEMA
from pipelines.vector_sizes import VectorSizes

SHARDS_PER_FILE = 1000  # row groups in one samples file, to keep its footer small
_CHECKED = {"write_page_checksum": True}  # for `verify`


class ManifestWriter:
    """Add the shards in their order, then `finish`; until then the folder `out` holds no data set.

    Counts of what was added: `num_samples`, `num_images`, `num_shards`, `nbytes`, `class_counts` (by name, labelled data).
    """

    def __init__(self, out: Path, kind: str, *, made_by: str = "pack") -> None:
        """Makes `out` when it is not there. `made_by` index: the shards are somebody else's."""
        self.out, self.kind, self.made_by = out, kind, made_by
        self.num_samples = self.num_images = self.nbytes = 0
        self.class_counts: dict[str, int] = {}
        self._weighted, self._sizes = False, VectorSizes()
        self._shards: list[dict[str, Any]] = []
        self._runs: list[pa.Table] = []
        self._samples: pyarrow.parquet.ParquetWriter | None = None
        (out / "samples").mkdir(parents=True, exist_ok=True)

    @property
    def num_shards(self) -> int:
        return len(self._shards)

    def add(self, url: str, nbytes: int, sha256: str, samples: pa.Table) -> None:
        """One shard: `url` absolute or relative to `out`, size and hash of its file, and its records as SCHEMA says.

        Raises Discard when their vectors or targets are not as long as all others, or only some records have a target.
        """
        self._sizes.add(url, samples)
        number = len(self._shards)
        file = f"samples/{number // SHARDS_PER_FILE:05d}.parquet"
        if number % SHARDS_PER_FILE == 0:
            self._close_samples()
            self._samples = pyarrow.parquet.ParquetWriter(self.out / file, SCHEMA, compression="zstd", **_CHECKED)
        assert self._samples is not None
        self._samples.write_table(samples, row_group_size=max(1, samples.num_rows))
        self._shards.append(
            {
                "url": url,
                "num_samples": samples.num_rows,
                "nbytes": nbytes,
                "sha256": sha256,
                "samples": file,
                "row_group": number % SHARDS_PER_FILE,
                "num_bad": int(pc.sum(samples["bad"]).as_py() or 0),
            }
        )
        self.num_samples += samples.num_rows
        self.num_images += int(pc.sum(pc.equal(pc.list_flatten(samples["dim"]), 0)).as_py() or 0)
        self.nbytes += nbytes
        self._weighted |= bool(pc.any(pc.not_equal(samples["weight"], 1.0)).as_py())
        if self.kind == "labelled":
            self._note_classes(number, samples["label"].combine_chunks())

    def finish(self) -> None:
        """Write what is not yet there; manifest.json last."""
        self._close_samples()
        shards = pa.Table.from_pylist(self._shards, SHARDS_SCHEMA)
        pyarrow.parquet.write_table(shards, self.out / "shards.parquet", **_CHECKED)
        runs = pa.schema({name: pa.int64() for name in ("shard", "start", "length")})
        pyarrow.parquet.write_table(pa.concat_tables([runs.empty_table(), *self._runs]), self.out / "runs.parquet", **_CHECKED)
        names = sorted(self.class_counts)
        groups, counts = [hash_entity(name) for name in names], [self.class_counts[name] for name in names]
        types = pa.schema({"name": pa.string(), "group": pa.int64(), "count": pa.int64()})
        classes = pa.table({"name": names, "group": groups, "count": counts}, schema=types)
        pyarrow.parquet.write_table(classes, self.out / "classes.parquet", **_CHECKED)
        about = {
            "format": FORMAT,
            "version": VERSION,
            "order_version": ORDER_VERSION,
            "quarantine_version": 0,
            "kind": self.kind,
            "made_by": self.made_by,
            "num_samples": self.num_samples,
            "num_images": self.num_images,
            "num_shards": self.num_shards,
            "num_classes": len(names),
            "weighted": self._weighted,
            "vector_dim": self._sizes.vector,
            "target_dim": self._sizes.target,
            "nbytes": self.nbytes,
            "digest": digest_of(self.kind, shards),
        }
        (self.out / "manifest.json").write_text(json.dumps(about, indent=1) + "\n", "utf-8")

    def _note_classes(self, shard: int, label: pa.Array) -> None:
        """Runs of one class in a shard, and how many images a class has."""
        encoded = label.dictionary_encode()
        code = encoded.indices.to_numpy().astype(np.int64)
        start = np.flatnonzero(np.concatenate([[True], code[1:] != code[:-1]]))[: len(code)].astype(np.int64)
        length = np.diff(np.append(start, len(code)))
        self._runs.append(pa.table({"shard": np.full(len(start), shard, np.int64), "start": start, "length": length}))
        for name, count in zip(encoded.dictionary.to_pylist(), np.bincount(code).tolist(), strict=False):
            self.class_counts[name] = self.class_counts.get(name, 0) + count

    def _close_samples(self) -> None:
        if self._samples is not None:
            self._samples.close()
            self._samples = None
