"""Near hashes, against all pairs."""

from __future__ import annotations

import numpy as np
import pytest

from pipelines import hamming
from pipelines.hamming import count_bits, near


def test_bits_are_counted() -> None:
    values = np.asarray([0, 1, 2**64 - 1, 0b1011 << 40], np.uint64)
    assert count_bits(values).tolist() == [0, 1, 64, 3]


@pytest.mark.parametrize("distance", range(hamming.MOST + 1))
@pytest.mark.parametrize("at_once", [7, 2_000_000])
def test_every_near_pair_is_found_exactly_once(distance: int, at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hamming, "PAIRS_AT_ONCE", at_once)
    rng = np.random.default_rng(distance)
    ours = rng.integers(0, 2**64, 60, dtype=np.uint64)
    flips = [sum(1 << int(bit) for bit in rng.choice(64, n, replace=False)) for n in rng.integers(0, 16, 40)]
    theirs = np.concatenate([ours[:40] ^ np.asarray(flips, np.uint64), ours[:5], rng.integers(0, 2**64, 50, dtype=np.uint64)])
    found = sorted(pair for part in near(ours, theirs, distance) for pair in zip(*(x.tolist() for x in part), strict=True))
    bits = [[bin(int(a) ^ int(b)).count("1") for b in theirs] for a in ours]
    assert found == sorted((i, j, bits[i][j]) for i in range(len(ours)) for j in range(len(theirs)) if bits[i][j] <= distance)
    assert found


def test_too_large_a_distance_is_refused() -> None:
    with pytest.raises(ValueError, match="from 0 to 11"):
        next(near(np.zeros(1, np.uint64), np.zeros(1, np.uint64), 12))
