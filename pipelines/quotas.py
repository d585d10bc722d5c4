"""Whose turn it is in a stream mixed of several sources: whole numbers, by a formula."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pipelines.hashing import Int64s

LONGEST_BLOCK = 4096
NEAR = 2e-4  # relative: 0.3333 counts as a third


class Quotas:
    """Of every `block` positions, source s has `per_block[s]`, spread evenly: it is never a whole position early or late.

    The shares are exact where the weights have a common denominator of at most LONGEST_BLOCK, else the nearest that such a
    block allows; every source has at least one position in it.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        """weights: [S], each above 0."""
        self.per_block: Int64s = _per_block(np.asarray(weights, dtype=np.float64))
        self.block = int(self.per_block.sum())
        turns = np.zeros((self.block + 1, len(weights)), dtype=np.int64)
        turns[np.arange(1, self.block + 1), _spread(self.per_block)] = 1
        self._before = turns.cumsum(axis=0)

    def before(self, position: ArrayLike) -> Int64s:
        """How many of the first `position` positions each source has.  [...] -> [..., S]"""
        blocks, rest = np.divmod(np.asarray(position, dtype=np.int64), self.block)
        return np.asarray(blocks[..., None] * self.per_block + self._before[rest], dtype=np.int64)

    def most(self, batch: int) -> Int64s:
        """The most positions that any `batch` in a row give to each source.  [S]"""
        starts = np.arange(self.block)
        return np.asarray((self.before(starts + batch) - self.before(starts)).max(axis=0), dtype=np.int64)


def _per_block(weights: NDArray[np.float64]) -> Int64s:
    """Positions of each source in the shortest block that has the shares exactly, else in the longest one.  [S] -> [S]"""
    shares = weights / weights.sum()
    ideal = np.outer(np.arange(1, LONGEST_BLOCK + 1), shares)  # [blocks, S]
    whole = np.rint(ideal)
    exact = ((np.abs(ideal - whole) <= NEAR * ideal) & (whole >= 1)).all(axis=1)
    exact &= whole.sum(axis=1) == np.arange(1, LONGEST_BLOCK + 1)
    if exact.any():
        return np.asarray(whole[exact.argmax()], dtype=np.int64)
    quotas: Int64s = np.maximum(np.floor(ideal[-1]), 1).astype(np.int64)
    while (missing := LONGEST_BLOCK - int(quotas.sum())) != 0:  # largest remainder; the smallest sources may have had too much
        remainder = ideal[-1] - quotas
        if missing > 0:
            quotas[np.argsort(-remainder, kind="stable")[:missing]] += 1
        else:
            quotas[np.where(quotas > 1, remainder, np.inf).argmin()] -= 1
    return quotas


def _spread(quotas: Int64s) -> Int64s:
    """The source of every position of a block: earliest deadline first.  [S] -> [block]

    Turn c of a source is due in [c * block / quota, (c + 1) * block / quota); with one turn at each position this keeps
    every deadline (Liu and Layland 1973), so that no source is ever a whole turn off its share.
    """
    block = int(quotas.sum())
    taken = np.zeros_like(quotas)
    turns = np.empty(block, dtype=np.int64)
    for place in range(block):
        released = taken * block < (place + 1) * quotas
        deadline = -(-(taken + 1) * block // quotas)
        turns[place] = np.where(released, deadline, block + 1).argmin()
        taken[turns[place]] += 1
    return turns
