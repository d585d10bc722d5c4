"""Triplets by relevance, against the plain matrix of relevances."""

from __future__ import annotations

import tracemalloc
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from pipelines.hashing import Int64s
from pipelines.relevance import Float32s, Float64s, relevance_of, relevance_triplets


def made(sizes: tuple[int, ...], dim: int = 4, *, seed: int = 0) -> tuple[Float32s, Int64s]:
    """Vectors of any direction (about half of all cosines are below 0), categories mixed."""
    rng = np.random.default_rng(seed)
    category = rng.permutation(np.repeat(np.arange(len(sizes)), sizes)) * 7 - 3
    vectors = rng.normal(size=(len(category), dim)) + 0.8 * np.eye(dim)[category % dim]
    return (vectors * rng.uniform(0.1, 9, size=(len(category), 1))).astype(np.float32), category


def matrix(vectors: Float32s, category: Int64s) -> Float64s:
    """r_ij in float64, 0 on the diagonal.  [N, N]"""
    unit = vectors.astype(np.float64) / np.linalg.norm(vectors.astype(np.float64), axis=1, keepdims=True)
    relevance = np.maximum(unit @ unit.T, 0) * (category[:, None] == category)
    np.fill_diagonal(relevance, 0)
    return np.asarray(relevance)


def chi_square(seen: NDArray[Any], expected: Float64s) -> float:
    """Chi-square over its degrees of freedom: about 1, with standard deviation sqrt(2 / degrees)."""
    expected = expected / expected.sum() * seen.sum()
    used = expected > 0
    assert not seen[~used].any()
    return float(((seen[used] - expected[used]) ** 2 / expected[used]).sum() / (used.sum() - 1))


@pytest.mark.parametrize("buffer", [256, 8])
def test_anchors_come_in_proportion_to_total_relevance(buffer: int) -> None:
    """Also from reservoirs that hold a part of the category only."""
    vectors, category = made((30, 50, 20))
    rows = relevance_triplets(vectors, category, 40_000, seed=1, buffer=buffer, min_gap=1e-4, out_of_class=1.0)
    relevance = matrix(vectors, category)
    ratio = chi_square(np.bincount(rows[:, 0], minlength=100), relevance.sum(1))
    assert ratio < 1.6  # 99 degrees: four standard deviations
    uniform = chi_square(np.bincount(rows[:, 0], minlength=100), np.ones(100))
    assert uniform > 10, "the test would not see anchors drawn alike"


@pytest.mark.parametrize("buffer", [256, 12])
def test_positives_come_in_proportion_to_their_capped_relevance(buffer: int) -> None:
    """Reservoirs of 12 of the 40 images give the positives of the whole category, though they prefer relevant images."""
    rng = np.random.default_rng(0)
    vectors, category = rng.normal(size=(80, 6)).astype(np.float32), np.repeat([0, 1], 40)
    vectors[:, 0] += rng.uniform(0, 4, size=80)  # total relevance from 1.5 to 24
    rows = relevance_triplets(
        vectors, category, 60_000, seed=2, buffer=buffer, max_relevance=0.3, min_gap=1e-4, out_of_class=1.0
    )
    relevance, seen = matrix(vectors, category), np.zeros((80, 80))
    np.add.at(seen, (rows[:, 0], rows[:, 1]), 1)

    def ratio(weights: Float64s) -> float:
        return chi_square(seen, weights / weights.sum(1, keepdims=True) * seen.sum(1, keepdims=True))

    assert ratio(np.minimum(relevance, 0.3)) < 1.3
    assert ratio(relevance) > 3, "the test would not see a missing cap"


def test_negatives_of_the_category_hold_the_gap_and_follow_their_relevance() -> None:
    vectors, category = made((25, 25), seed=3)
    relevance = matrix(vectors, category)
    rows = relevance_triplets(vectors, category, 20_000, seed=3, min_gap=0.2, max_relevance=0.5, out_of_class=0.0)
    anchor, positive, negative = rows.T
    np.testing.assert_array_equal(category[rows], category[anchor][:, None].repeat(3, axis=1))
    assert (np.diff(np.sort(rows, axis=1), axis=1) > 0).all(), "three different images"
    assert (relevance[anchor, positive] - relevance[anchor, negative]).min() >= 0.2 - 1e-6
    assert relevance[anchor, negative].min() > 0
    expected, capped = np.zeros((50, 50)), np.minimum(relevance, 0.5)
    for i, p in zip(anchor, positive, strict=True):
        able = capped[i] * (relevance[i] <= relevance[i, p] - 0.2)
        expected[i] += able / able.sum()
    seen = np.zeros((50, 50))
    np.add.at(seen, (anchor, negative), 1)
    assert chi_square(seen, expected) < 1.3


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_the_share_of_negatives_from_other_categories_holds(share: float) -> None:
    """And these are uniform over all images of the other categories."""
    vectors, category = made((10, 30, 60))
    rows = relevance_triplets(vectors, category, 10_000, seed=4, out_of_class=share)
    outside = category[rows[:, 0]] != category[rows[:, 2]]
    assert outside.sum() == round(share * 10_000)
    if share:
        seen, expected = np.zeros((3, 100)), np.zeros((3, 100))
        names = np.unique(category)
        for c, name in enumerate(names):
            of_category = outside & (category[rows[:, 0]] == name)
            seen[c] = np.bincount(rows[of_category, 2], minlength=100)
            expected[c] = np.where(category == name, 0, of_category.sum() / (category != name).sum())
        assert chi_square(seen, expected) < 1.5
    first = outside[:5000].mean()
    assert abs(first - share) < 0.03, "the two kinds are mixed"


def test_the_seed_alone_decides() -> None:
    vectors, category = made((12, 9))
    again = [relevance_triplets(vectors, category, 50, seed=seed, buffer=5) for seed in (7, 7, 8)]
    np.testing.assert_array_equal(again[0], again[1])
    assert (again[0] != again[2]).any()


def test_total_relevance_is_exact_across_blocks() -> None:
    vectors, category = made((4200, 1100), dim=8)
    members = [np.flatnonzero(category == name) for name in np.unique(category)]
    found, relevance = relevance_of(vectors, members), matrix(vectors, category)
    np.testing.assert_allclose(found.total, relevance.sum(1), rtol=1e-5)
    np.testing.assert_allclose(found.highest, relevance.max(1), atol=1e-6)
    np.testing.assert_allclose(found.lowest, np.where(relevance > 1e-9, relevance, 9).min(1), atol=1e-6)


def test_memory_does_not_grow_with_the_square() -> None:
    """A matrix of relevances would be 1.6 GB."""
    vectors, category = made((20_000,), dim=2)
    tracemalloc.start()
    relevance_triplets(vectors, category, 100, seed=0, out_of_class=0.0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100e6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"category": np.array([0, 0, 0, 1, 1, 2])}, "1 categories have one image"),
        ({"category": np.zeros(6, dtype=int)}, "set out_of_class to 0"),
        ({"count": 0}, "count"),
        ({"buffer": 2}, "buffer"),
        ({"min_gap": 0.0}, "min_gap"),
        ({"min_gap": 1.0}, "lower min_gap"),
        ({"vectors": np.full((6, 2), np.nan, dtype=np.float32)}, "not finite"),
        ({"vectors": np.ones((5, 2), dtype=np.float32)}, "one row and one category"),
        ({"vectors": np.ones((6, 2), dtype=np.float32)}, "negative of the anchor's category"),
    ],
)
def test_what_cannot_be_drawn_is_said(change: dict[str, Any], message: str) -> None:
    vectors, category = made((3, 3))
    given = {"vectors": vectors, "category": category, "count": 4, "seed": 0, **change}
    with pytest.raises(ValueError, match=message):
        relevance_triplets(**given)
