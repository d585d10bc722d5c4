"""Which images of a data set are also in another one, or twice in itself: the same bytes or pixels, or nearly the same."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipelines.fingerprints import Images, Prints
from pipelines.hamming import near
from pipelines.hashing import Int64s
from pipelines.phash import TOLERANCE, differ

DISTANCE = 10  # bits of 64 by which the hashes of copies may differ; see tests/pipelines/test_duplicates.py
KINDS = ("same", "near", "encoder")  # the surest first
HASH_BITS = 64

Allowed = Callable[[Int64s, Int64s], NDArray[np.bool_]]  # rows of ours, rows of theirs -> which pairs count; both broadcast


@dataclass(frozen=True, slots=True)
class Matches:
    """For each of our images at most one of theirs, the best.  [n] each"""

    ours: Int64s  # rising
    theirs: Int64s
    kind: Int64s  # number in KINDS
    score: NDArray[np.float64]  # 1 for the same; 1 - distance / 64; the cosine

    @staticmethod
    def of(kind: str, ours: Int64s, theirs: Int64s, score: NDArray[np.float64] | float) -> Matches:
        scores = np.broadcast_to(np.asarray(score, np.float64), ours.shape)
        return Matches(ours, theirs, np.full(len(ours), KINDS.index(kind)), scores)

    def or_else(self, other: Matches) -> Matches:
        """These, and for images that are in none of them those of `other`."""
        more = ~np.isin(other.ours, self.ours)
        names = ("ours", "theirs", "kind", "score")
        parts = [np.concatenate([getattr(self, name), getattr(other, name)[more]]) for name in names]
        order = np.argsort(parts[0], kind="stable")
        return Matches(*(part[order] for part in parts))

    def counts(self) -> dict[str, int]:
        """How many there are of each kind."""
        return dict(zip(KINDS, np.bincount(self.kind, minlength=len(KINDS)).tolist(), strict=True))


def anything(ours: Int64s, theirs: Int64s) -> NDArray[np.bool_]:
    """Every pair of two data sets counts."""
    return np.ones(np.broadcast_shapes(ours.shape, theirs.shape), np.bool_)


def across_classes(images: Images) -> Allowed:
    """Of a data set with itself: an image counts with those before it that are of another class (or group)."""
    return lambda ours, theirs: (ours > theirs) & (images.group[ours] != images.group[theirs])


def same_files(ours: Images, theirs: Images, allowed: Allowed = anything) -> Matches:
    """Equal bytes. Reads no image."""
    return _same(ours.uid, theirs.uid, theirs.group, allowed)


def lookalikes(
    ours: Prints, theirs: Prints, allowed: Allowed = anything, *, distance: int = DISTANCE, tolerance: float = TOLERANCE
) -> Matches:
    """Equal pixels, or hashes of at most `distance` bits apart and thumbnails that agree to `tolerance` grey levels.

    Mirrored copies count. Images that show nearly nothing are compared by their pixels only. Raises ValueError as `near` does.
    """
    same = _same(ours.pixels, theirs.pixels, theirs.images.group, allowed)
    mine, place = _distinct(ours)
    others, _ = _distinct(theirs)
    found = _near(ours, theirs, mine, others, allowed, distance, tolerance)
    best = np.full(len(mine), -1)
    best[np.searchsorted(mine, found.ours)] = np.arange(len(found.ours))
    rows = np.flatnonzero(best[place] >= 0)  # an image that is there several times has one answer
    picked = best[place[rows]]
    return same.or_else(Matches.of("near", rows, found.theirs[picked], found.score[picked]))


def _same(ours: Int64s, theirs: Int64s, group: Int64s, allowed: Allowed) -> Matches:
    """The first of theirs that counts, among those of equal content."""
    order = np.lexsort((np.arange(len(theirs)), group, theirs))  # of each content and group the first is enough
    fresh = np.ones(len(order), np.bool_)
    fresh[1:] = (np.diff(theirs[order]) != 0) | (np.diff(group[order]) != 0)
    firsts = np.sort(order[fresh])
    firsts = firsts[np.argsort(theirs[firsts], kind="stable")]
    start = np.searchsorted(theirs[firsts], ours)
    end = np.searchsorted(theirs[firsts], ours, side="right")
    pairs = []
    for row in np.flatnonzero(end > start).tolist():
        candidates = firsts[start[row] : end[row]]
        counts = allowed(np.full(len(candidates), row), candidates)
        if counts.any():
            pairs.append((row, int(candidates[counts.argmax()])))
    found = np.asarray(pairs, np.int64).reshape(-1, 2)
    return Matches.of("same", found[:, 0], found[:, 1], 1.0)


def _distinct(prints: Prints) -> tuple[Int64s, Int64s]:
    """The first image of each content and class, rising, and for every image which of them it is like."""
    both = np.stack([prints.pixels, prints.images.group], axis=1)
    _, first, inverse = np.unique(both, axis=0, return_index=True, return_inverse=True)
    order = np.argsort(first)
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    return first[order], rank[inverse.reshape(-1)]


def _near(
    ours: Prints, theirs: Prints, mine: Int64s, others: Int64s, allowed: Allowed, distance: int, tolerance: float
) -> Matches:
    """The nearest of `others` for each of `mine`; ties go to the first."""
    mine, others = mine[~ours.flat[mine]], others[~theirs.flat[others]]
    kept = []
    for hashes in (theirs.hash, theirs.mirrored):
        for pairs in near(ours.hash[mine], hashes[others], distance):
            a, b = mine[pairs.first], others[pairs.second]
            good = np.flatnonzero(allowed(a, b))
            good = good[differ(ours.thumb[a[good]], theirs.thumb[b[good]]) <= tolerance]
            kept.append(np.stack([a[good], pairs.distance[good], b[good]]))
    a, bits, b = np.concatenate([np.empty((3, 0), np.int64), *kept], axis=1)
    order = np.lexsort((b, bits, a))
    order = order[np.diff(a[order], prepend=-1) != 0]
    return Matches.of("near", a[order], b[order], 1.0 - bits[order] / HASH_BITS)
