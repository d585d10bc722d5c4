"""Approximate search with faiss: an HNSW graph beside the embeddings, made once. It holds all vectors in memory."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from cluster.embeddings import Embeddings
from cluster.nearest import Best, Vectors, nearest
from cluster.progress import say
from pipelines.hashing import Int64s

NEIGHBOURS, BUILD_EFFORT, EFFORT = 32, 100, 128  # M, efConstruction, efSearch
SAMPLED, SAMPLED_K = 100, 10


class Approximate:
    """The graph of an embeddings file. `recall` is the share of a sample's true ten nearest that it finds."""

    def __init__(self, embeddings: Embeddings) -> None:
        """Reads OUT.parquet.faiss, or makes it. Raises ValueError when faiss is not installed."""
        try:
            import faiss
        except ImportError:
            raise ValueError("--index faiss needs faiss: pip install 'nearfar[faiss]'") from None
        self._index: Any
        file = embeddings.path.with_name(f"{embeddings.path.name}.faiss")
        about, told = file.with_name(f"{file.name}.json"), os.stat(embeddings.path)
        stamp = [told.st_size, told.st_mtime_ns, NEIGHBOURS, BUILD_EFFORT, EFFORT]
        if file.exists() and about.exists() and (kept := json.loads(about.read_text("utf-8")))["stamp"] == stamp:
            self._index = faiss.read_index(str(file))
            self.recall: float = kept["recall"]
            return
        say(f"making {file}, once")
        self._index = _build(faiss, embeddings)
        self.recall = self._measure(embeddings)
        _replace(file, lambda path: faiss.write_index(self._index, str(path)))
        _replace(about, lambda path: path.write_text(json.dumps({"stamp": stamp, "recall": self.recall}), "utf-8"))

    def search(self, queries: Vectors, k: int, skip: list[Int64s]) -> list[Best]:
        """As `nearest`, but some of the nearest may be missing."""
        more = k + max((len(rows) for rows in skip), default=0)
        self._index.hnsw.efSearch = max(EFFORT, 2 * more)
        scores, rows = self._index.search(np.ascontiguousarray(queries), more)
        found = []
        for number in range(len(queries)):
            kept = (rows[number] >= 0) & ~np.isin(rows[number], skip[number])
            best = Best(k)
            best.add(rows[number][kept].astype(np.int64), scores[number][kept].astype(np.float64))
            found.append(best)
        return found

    def _measure(self, embeddings: Embeddings) -> float:
        """Recall against exact search, of rows spread evenly over the file."""
        sample = np.unique(np.linspace(0, embeddings.num_rows - 1, min(SAMPLED, embeddings.num_rows)).astype(np.int64))
        queries = np.concatenate(
            [vectors[sample[_within(sample, start, vectors)] - start] for start, vectors in embeddings.vectors()]
        )
        skip = [np.asarray([row]) for row in sample]
        true = nearest(embeddings.vectors(), queries, SAMPLED_K, skip=skip)
        found = self.search(queries, SAMPLED_K, skip)
        hits = sum(len(np.intersect1d(a.rows, b.rows)) for a, b in zip(true, found, strict=True))
        return hits / max(1, sum(len(best.rows) for best in true))


def _within(rows: Int64s, start: int, vectors: Vectors) -> Any:
    return (rows >= start) & (rows < start + len(vectors))


def _build(faiss: Any, embeddings: Embeddings) -> Any:
    index = faiss.IndexHNSWFlat(embeddings.dim, NEIGHBOURS, faiss.METRIC_INNER_PRODUCT)
    index.hnsw.efConstruction = BUILD_EFFORT
    for _, vectors in embeddings.vectors():
        index.add(np.ascontiguousarray(vectors))
    return index


def _replace(file: Path, write: Any) -> None:
    temporary = file.with_name(f"{file.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)
