"""Pairs and triplets drawn from labelled images: rows that go together, each a function of (seed, row) alone."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pipelines.hashing import Int64s, hash_ints

_TAG_POSITIVE, _TAG_NEGATIVE, _TAG_CLASS, _TAG_FEW = 111, 112, 113, 114
NEAREST = 10  # classes of which a near one is drawn
_BLOCK = 2**22  # similarities at once


class Classes:
    """Rows by class. `codes` [n]: the class of every row, 0..C-1."""

    def __init__(self, codes: Int64s) -> None:
        self.codes = codes
        self._order = np.argsort(codes, kind="stable")
        self._count = np.bincount(codes)
        self._start = np.cumsum(self._count) - self._count
        self._place = np.empty_like(codes)  # of each row within its class
        self._place[self._order] = np.arange(len(codes)) - self._start[codes[self._order]]

    def few(self, limit: int, seed: int) -> Int64s:
        """At most `limit` rows of each class, in their order."""
        shuffled = np.argsort(hash_ints(seed, _TAG_FEW, np.arange(len(self.codes))), kind="stable")
        by_class = shuffled[np.argsort(self.codes[shuffled], kind="stable")]
        place = np.arange(len(by_class)) - self._start[self.codes[by_class]]
        return np.sort(by_class[place < limit])

    def anchors(self, per_image: int) -> Int64s:
        """Rows that have another one of their class, each `per_image` times."""
        return np.repeat(np.flatnonzero(self._count[self.codes] > 1), per_image)

    def positives(self, anchors: Int64s, seed: int) -> Int64s:
        """Another row of each anchor's class."""
        count = self._count[self.codes[anchors]]
        step = 1 + _uniform(seed, _TAG_POSITIVE, anchors, count - 1)
        return np.asarray(self._order[self._start[self.codes[anchors]] + (self._place[anchors] + step) % count])

    def negatives(self, anchors: Int64s, seed: int) -> Int64s:
        """A row of any other class."""
        start, count = self._start[self.codes[anchors]], self._count[self.codes[anchors]]
        drawn = _uniform(seed, _TAG_NEGATIVE, anchors, len(self.codes) - count)
        return np.asarray(self._order[np.where(drawn < start, drawn, drawn + count)])


def pairs(codes: Int64s, per_image: int, seed: int) -> Int64s:
    """Every image with another one of its class, `per_image` times.  [n] -> [m, 2] rows"""
    classes = Classes(codes)
    anchors = classes.anchors(per_image)
    return np.stack([anchors, classes.positives(anchors, seed)], 1)


def labelled_pairs(codes: Int64s, per_image: int, seed: int) -> tuple[Int64s, NDArray[np.int8]]:
    """Every image `per_image` times with one of its class and as often with one of another.  [n] -> [m, 2] rows, match [m]"""
    classes = Classes(codes)
    anchors = classes.anchors(per_image)
    same, other = classes.positives(anchors, seed), classes.negatives(anchors, seed)
    rows = np.stack([np.repeat(anchors, 2), np.stack([same, other], 1).reshape(-1)], 1)
    return rows, np.tile(np.asarray([1, 0], np.int8), len(anchors))


def triplets(codes: Int64s, per_image: int, seed: int) -> Int64s:
    """Every image with one of its class and one of another, `per_image` times.  [n] -> [m, 3] rows"""
    classes = Classes(codes)
    anchors = classes.anchors(per_image)
    return np.stack([anchors, classes.positives(anchors, seed), classes.negatives(anchors, seed)], 1)


def other_classes(vectors: NDArray[np.float32], codes: Int64s, how: str, seed: int) -> Int64s:
    """For each row another class: any (`random`), one of its NEAREST by cosine (`near`), one of the farther half (`far`).

    `vectors` [C, E], one a class; `codes` [n].  -> [n]
    """
    count = len(vectors)
    if how == "random":
        drawn = _uniform(seed, _TAG_CLASS, np.arange(len(codes)), np.full(len(codes), count - 1))
        return np.where(drawn < codes, drawn, drawn + 1)
    unit = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    width = min(NEAREST, count - 1) if how == "near" else max(1, (count - 1) // 2)
    chosen = np.empty((count, width), np.int64)
    rows = max(1, _BLOCK // count)
    for first in range(0, count, rows):
        block = unit[first : first + rows] @ unit.T
        own = np.arange(len(block))
        block[own, first + own] = -np.inf if how == "near" else np.inf  # never itself
        chosen[first : first + rows] = np.argsort(-block if how == "near" else block, axis=1, kind="stable")[:, :width]
    drawn = _uniform(seed, _TAG_CLASS, np.arange(len(codes)), np.full(len(codes), width))
    return chosen[codes, drawn]


def _uniform(seed: int, tag: int, rows: Int64s, below: Int64s) -> Int64s:
    """A number in 0..below-1 for each of `rows`; the second time that a row comes it gets another one.  [m] each"""
    order = np.argsort(rows, kind="stable")
    first = np.searchsorted(rows[order], rows[order])
    use = np.empty_like(rows)
    use[order] = np.arange(len(rows)) - first
    return (hash_ints(seed, tag, rows, use) % below.astype(np.uint64)).astype(np.int64)
