"""The nearest of many vectors, exactly, a chunk of them at a time."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from pipelines.hashing import Int64s

Vectors = NDArray[np.float32]
Scores = NDArray[np.float64]


class Best:
    """The `k` rows with the largest scores that one query has met so far; of equal scores the first row."""

    def __init__(self, k: int) -> None:
        self.rows: Int64s = np.empty(0, np.int64)
        self.scores: Scores = np.empty(0, np.float64)
        self._k = k

    @property
    def least(self) -> float:
        """What a score must reach to count."""
        return float(self.scores[-1]) if len(self.scores) == self._k else -np.inf

    def add(self, rows: Int64s, scores: Scores) -> None:
        rows, scores = np.concatenate([self.rows, rows]), np.concatenate([self.scores, scores])
        order = np.lexsort((rows, -scores))[: self._k]
        self.rows, self.scores = rows[order], scores[order]


def nearest(
    chunks: Iterable[tuple[int, Vectors]], queries: Vectors, k: int, *, skip: Sequence[Int64s] | None = None, raw: bool = False
) -> list[Best]:
    """For each query the `k` vectors of largest inner product.  chunks: (number of the first row, [n, D]); queries [q, D]

    As computed in float64 of vectors of length 1: what float32 cannot tell apart is looked at again. `raw`: those of least
    euclidean distance, of vectors of any length; the score is minus the distance. `skip`: for each query rows, rising, that
    do not count.
    """
    found = [Best(k) for _ in queries]
    margin = 0.0 if raw else 4.0 * queries.shape[1] * float(np.finfo(np.float32).eps)
    for start, vectors in chunks:
        scores = _minus_distances(queries, vectors) if raw else queries @ vectors.T  # [q, n]
        for number, best in enumerate(found):
            mine = scores[number]
            if skip is not None:
                here = skip[number][(skip[number] >= start) & (skip[number] < start + len(mine))] - start
                mine[here] = -np.inf
            least = max(best.least, float(np.partition(mine, -k)[-k]) if len(mine) >= k else -np.inf)
            rows = np.flatnonzero((mine >= least - margin) & (mine > -np.inf))
            if len(rows):
                exact = (
                    mine[rows] if raw else (vectors[rows].astype(np.float64) * queries[number].astype(np.float64)).sum(axis=1)
                )
                best.add(rows + start, exact)
    return found


def _minus_distances(queries: Vectors, vectors: Vectors) -> Scores:
    """[q, n] in float64, number by number: nothing cancels."""
    squared = np.zeros((len(queries), len(vectors)))
    for i in range(queries.shape[1]):
        squared += np.square(queries[:, i, None].astype(np.float64) - vectors[None, :, i])
    scores: Scores = -np.sqrt(squared)
    return scores
