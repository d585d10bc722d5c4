"""All pairs of 64-bit hashes that differ in few bits, without comparing every pair."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipelines.hashing import Int64s, Uint64s

BANDS, BITS = 4, 16
MOST = 11  # bits: beyond, more than two bits of every band may differ
PAIRS_AT_ONCE = 2_000_000


class Near(NamedTuple):
    """Pairs: `first[i]` of the one list and `second[i]` of the other differ in `distance[i]` bits.  [n] each"""

    first: Int64s
    second: Int64s
    distance: Int64s


def near(ours: Uint64s, theirs: Uint64s, distance: int) -> Iterator[Near]:
    """Every pair that differs in at most `distance` bits, exactly once, in pieces.  [n], [m]

    Multi-index hashing (Norouzi, Punjani, Fleet 2012): of 4 bands of 16 bits one differs in at most distance // 4 bits, so
    only what shares a band but for so many bits is looked at. Raises ValueError above MOST.
    """
    if not 0 <= distance <= MOST:
        raise ValueError(f"a distance of {distance} bits; it may be from 0 to {MOST}")
    flips = [sum(1 << bit for bit in bits) for n in range(distance // BANDS + 1) for bits in combinations(range(BITS), n)]
    for band in range(BANDS):
        values, order = _band(theirs, band), np.argsort(_band(theirs, band), kind="stable").astype(np.int64)
        starts = np.searchsorted(values[order], np.arange(2**BITS + 1))
        mine = _band(ours, band)
        for flip in flips:
            for first, second in _meet(mine ^ flip, starts, order):
                bits = count_bits(ours[first] ^ theirs[second])
                # Those that an earlier band has led to were given there.
                fresh = (bits <= distance) & ~_met_before(ours[first] ^ theirs[second], band, distance // BANDS)
                yield Near(first[fresh], second[fresh], bits[fresh])


def count_bits(values: Uint64s) -> Int64s:
    """How many bits are set in each."""
    x = values - ((values >> np.uint64(1)) & np.uint64(0x5555555555555555))
    x = (x & np.uint64(0x3333333333333333)) + ((x >> np.uint64(2)) & np.uint64(0x3333333333333333))
    x = (x + (x >> np.uint64(4))) & np.uint64(0x0F0F0F0F0F0F0F0F)
    counts: Int64s = ((x * np.uint64(0x0101010101010101)) >> np.uint64(56)).astype(np.int64)
    return counts


def _band(hashes: Uint64s, band: int) -> Int64s:
    return ((hashes >> np.uint64(BITS * band)) & np.uint64(2**BITS - 1)).astype(np.int64)


def _met_before(difference: Uint64s, band: int, most: int) -> NDArray[np.bool_]:
    met = np.zeros(len(difference), dtype=bool)
    for earlier in range(band):
        met |= count_bits(_band(difference, earlier).astype(np.uint64)) <= most
    return met


def _meet(values: Int64s, starts: Int64s, order: Int64s) -> Iterator[tuple[Int64s, Int64s]]:
    """Pairs (row of `values`, row of the others) of equal value. `order` sorts the others; value v is at starts[v:v + 2]."""
    count = starts[values + 1] - starts[values]
    upto = np.cumsum(count)
    begin = 0
    while begin < len(values):
        done = upto[begin - 1] if begin else 0
        end = max(begin + 1, int(np.searchsorted(upto, done + PAIRS_AT_ONCE, side="right")))
        many = count[begin:end]
        first = np.repeat(np.arange(begin, end), many)
        place = np.arange(len(first)) - np.repeat(np.cumsum(many) - many, many) + np.repeat(starts[values[begin:end]], many)
        yield first, order[place]
        begin = end
