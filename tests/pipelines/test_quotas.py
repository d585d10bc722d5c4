"""Whose turn it is when sources are mixed."""

from __future__ import annotations

import numpy as np
import pytest

from pipelines.quotas import LONGEST_BLOCK, Quotas


@pytest.mark.parametrize(
    ("weights", "per_block"),
    [
        ([1.0], [1]),
        ([5.0, 5.0], [1, 1]),
        ([0.7, 0.3], [7, 3]),
        ([1 / 3, 2 / 3], [1, 2]),
        ([0.3333, 0.6667], [1, 2]),
        ([3.0, 1.5, 0.5], [6, 3, 1]),
        ([0.25, 0.25, 0.5], [1, 1, 2]),
        ([4095.0, 1.0], [4095, 1]),
    ],
)
def test_shares_are_exact_where_a_short_block_has_them(weights: list[float], per_block: list[int]) -> None:
    assert Quotas(weights).per_block.tolist() == per_block


def test_other_shares_are_as_near_as_a_long_block_allows_and_never_nothing() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        weights = rng.random(int(rng.integers(2, 30))) + 1e-9
        quotas = Quotas(weights.tolist())
        due = quotas.block * weights / weights.sum()
        if quotas.block < LONGEST_BLOCK:  # as good as exact
            assert (np.abs(quotas.per_block - due) <= 2e-4 * due).all()
        else:
            assert (np.abs(quotas.per_block - due) < 1).all()
    tiny = Quotas([1e-12] * 40 + [1.0, np.pi])
    assert tiny.block == LONGEST_BLOCK
    assert tiny.per_block[:40].tolist() == [1] * 40


@pytest.mark.parametrize("weights", [[1.0, 1.0], [9.0] + [1 / 9] * 9, [0.31, 0.59, 0.1], [np.pi, 1.0, np.e], [1.0] * 30])
def test_a_source_is_never_a_whole_position_off_its_share(weights: list[float]) -> None:
    quotas = Quotas(weights)
    taken = quotas.before(np.arange(2 * quotas.block + 1))  # [p, S]
    assert taken[0].tolist() == [0] * len(weights)
    assert (np.diff(taken, axis=0).sum(axis=1) == 1).all()
    assert (np.diff(taken, axis=0) >= 0).all()
    due = np.arange(2 * quotas.block + 1)[:, None] * quotas.per_block / quotas.block
    assert np.abs(taken - due).max() < 1
    far = 10**13 * quotas.block
    assert (quotas.before(far + 2) == 10**13 * quotas.per_block + taken[2]).all()


def test_the_most_of_a_source_in_a_batch_is_what_a_search_finds() -> None:
    quotas = Quotas([0.3, 0.6, 0.1])
    turns = np.diff(quotas.before(np.arange(61)), axis=0)  # [60, S]
    for batch in (1, 2, 7, 10, 33):
        counts = [turns[start : start + batch].sum(axis=0) for start in range(10)]
        assert quotas.most(batch).tolist() == np.max(counts, axis=0).tolist()
