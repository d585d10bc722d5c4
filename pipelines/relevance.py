"""Triplets by relevance inside a category: the sampler of Deep Ranking (Wang et al. 2014, section 5).

The relevance of two images of one category is max(0, cosine) of their vectors, else 0; an image's total relevance r_i is
its sum over the other images. Anchors come out in proportion to r_i, positives to min(T_p, r_ij), and so do negatives of
the anchor's own category; other negatives are any image of another category. The order holds by a gap:
r_ip - r_in >= min_gap in every triplet.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pipelines.hashing import Int64s, Uint64s, hash_ints, permutation, stream

Float32s = NDArray[np.float32]
Float64s = NDArray[np.float64]
Bools = NDArray[np.bool_]

_TAG_CATEGORY, _TAG_KEY, _TAG_ANCHOR, _TAG_PARTNER, _TAG_ROWS = 1, 2, 3, 4, 5
_ROWS, _COLUMNS = 1024, 4096  # relevances held at once: 16 MiB
_FRUITLESS = 1000  # rounds of one category


@dataclass(frozen=True, slots=True)
class Rules:
    """What may be drawn: T_p, the smallest r_ip - r_in, images a reservoir holds, and the seed."""

    max_relevance: float
    min_gap: float
    buffer: int
    seed: int


@dataclass(frozen=True, slots=True)
class Relevance:
    """What is known of every image from one pass over the pairs of its category; [N] each."""

    total: Float64s  # over the other images
    highest: Float32s
    lowest: Float32s  # above 0; inf when there is none


def relevance_triplets(
    vectors: Float32s,
    category: ArrayLike,
    count: int,
    *,
    seed: int,
    buffer: int = 256,
    max_relevance: float = 0.8,
    min_gap: float = 0.05,
    out_of_class: float = 0.5,
) -> Int64s:
    """Rows of anchor, positive, negative, as indexes into `vectors`.  vectors [N, E], category [N] integers -> [count, 3]

    `buffer`: images that a category's reservoir holds; `max_relevance`: T_p; `out_of_class`: share of triplets whose negative
    is of another category, exact to one triplet. The same for the same input and seed; memory grows with N, time with the
    squares of the categories' sizes. Raises ValueError when an argument is out of range, a vector is not finite, a category has
    one image, or no triplet holds the gap.
    """
    category = np.asarray(category)
    rules = Rules(max_relevance, min_gap, buffer, seed)
    _check(vectors, category, count, rules, out_of_class)
    _, of_image = np.unique(category, return_inverse=True)
    sizes = np.bincount(of_image)
    _check_sizes(category, of_image, sizes, out_of_class)
    members = np.split(np.argsort(of_image, kind="stable"), np.cumsum(sizes)[:-1])
    seen = relevance_of(vectors, members)
    outside = round(count * out_of_class)
    rows = [_triplets(vectors, members, seen, n, rules, out) for n, out in ((outside, True), (count - outside, False)) if n]
    return np.concatenate(rows)[permutation(count, seed, _TAG_ROWS)]


def relevance_of(vectors: Float32s, members: list[Int64s]) -> Relevance:
    """Exact, in blocks; nothing of size [N, N] is held.  members: the images of each category"""
    total, highest = np.zeros(len(vectors)), np.zeros(len(vectors), dtype=np.float32)
    lowest = np.full(len(vectors), np.inf, dtype=np.float32)
    for of_category in members:
        for rows in _blocks(of_category, _ROWS):
            left = _unit(vectors[rows])
            for columns in _blocks(of_category, _COLUMNS):
                block = np.maximum(left @ _unit(vectors[columns]).T, 0)  # [rows, columns]
                block[rows[:, None] == columns] = 0
                total[rows] += block.sum(1, dtype=np.float64)
                highest[rows] = np.maximum(highest[rows], block.max(1))
                lowest[rows] = np.minimum(lowest[rows], np.where(block > 0, block, np.inf).min(1))
    return Relevance(total, highest, lowest)


def _triplets(vectors: Float32s, members: list[Int64s], seen: Relevance, count: int, rules: Rules, outside: bool) -> Int64s:
    """`count` triplets of one kind, category by category.  -> [count, 3]"""
    floor = np.float32(0) if outside else seen.lowest  # relevance of the farthest negative there is
    able = seen.highest - floor >= rules.min_gap
    weights = np.array([seen.total[images[able[images]]].sum() for images in members])
    if not weights.sum() > 0:
        kind = "of another category" if outside else "of the anchor's category"
        advice = "lower min_gap" if outside else "lower min_gap, or set out_of_class to 1"
        raise ValueError(f"no triplet with a negative {kind} has a gap of min_gap {rules.min_gap:g}; {advice}")
    drawn = _uniform(hash_ints(rules.seed, _TAG_CATEGORY, outside, np.arange(count)))
    wanted = np.bincount(_choose(np.broadcast_to(weights, (1, len(weights))), drawn), minlength=len(members))
    starts = np.concatenate([[0], np.cumsum([len(images) for images in members])])
    ordered, rows = np.concatenate(members), []
    for number in np.flatnonzero(wanted).tolist():
        own = _Category(vectors, members[number], seen.total, rules, number)
        found = own.triplets(int(wanted[number]), outside)
        if outside:  # uniform over all images but the category's
            x = _uniform(hash_ints(rules.seed, _TAG_PARTNER, number, 2, np.arange(len(found))))
            place = (x * (len(ordered) - len(own.images))).astype(np.int64)
            found[:, 2] = ordered[place + np.where(place >= starts[number], len(own.images), 0)]
        rows.append(found)
    return np.concatenate(rows)


class _Category:
    """Draws inside one category, a round at a time; a round has a reservoir of its own."""

    def __init__(self, vectors: Float32s, images: Int64s, total: Float64s, rules: Rules, number: int) -> None:
        self.images = images
        self.vectors, self.rules, self.number = vectors, rules, number
        self.weights = total[images]

    def triplets(self, count: int, outside: bool) -> Int64s:
        """[count, 3]; the last column is still to be filled when the negatives are from outside."""
        rows: list[Int64s] = []
        missing, turn, fruitless = count, 0, 0
        while missing:
            found = self._round(2 * turn + outside, min(missing, self.rules.buffer), outside)
            rows.append(found)
            missing, turn = missing - len(found), turn + 1
            fruitless = 0 if len(found) else fruitless + 1
            if fruitless == _FRUITLESS:
                raise ValueError(
                    f"{_FRUITLESS} reservoirs of {self.rules.buffer} images held no triplet; raise buffer or lower min_gap"
                )
        return np.concatenate(rows)

    def _round(self, turn: int, draws: int, outside: bool) -> Int64s:
        """At most `draws` triplets from one reservoir; an anchor without positive or negative in it gives none."""
        held, chance = self._reservoir(turn)
        anchors = self._anchors(held, turn, draws)
        images, found = self.images[held], []
        right = _unit(self.vectors[images])
        for part in _blocks(np.arange(draws), max(1, _ROWS * _COLUMNS // len(held))):
            relevance = np.maximum(right[anchors[part]] @ right.T, 0)  # [draws, held]
            relevance[np.arange(len(part)), anchors[part]] = 0
            x = _uniform(stream(hash_ints(self.rules.seed, _TAG_PARTNER, self.number, turn, 3, part), 2))
            positive, negative, valid = self._partners(relevance, chance, x, outside)
            found.append(np.stack([images[anchors[part]], images[positive], images[negative]], axis=1)[valid])
        return np.concatenate(found)

    def _reservoir(self, turn: int) -> tuple[Int64s, Float64s]:
        """Places of the `buffer` images with the largest keys u^(1/w), largest first, and each one's chance to be there.

        Efraimidis & Spirakis 2006; here as the smallest -log(u) / w. The keys depend on the image only, so the order in which
        images pass changes nothing. The chance is 1 - t^w for the first key t that was left out.
        """
        with np.errstate(divide="ignore"):
            keys = -np.log(_uniform(hash_ints(self.rules.seed, _TAG_KEY, turn, self.images))) / self.weights
        alive = int((self.weights > 0).sum())  # the others are relevant to no image
        size = min(self.rules.buffer, alive)
        if size == alive:
            return np.argsort(keys, kind="stable")[:size], np.ones(size)
        first = np.argpartition(keys, size)[: size + 1]
        first = first[np.argsort(keys[first], kind="stable")]
        return first[:size], -np.expm1(-self.weights[first[:size]] * keys[first[size]])

    def _anchors(self, held: Int64s, turn: int, draws: int) -> Int64s:
        """Independent draws in proportion to the weights, as places in the reservoir.  -> [draws], draws <= buffer

        The reservoir's order is one of drawing without replacement: a draw repeats one that was drawn, in proportion to
        its share of the whole weight, or takes the next.
        """
        drawn = np.cumsum(self.weights[held]).tolist()
        x = _uniform(hash_ints(self.rules.seed, _TAG_ANCHOR, self.number, turn, np.arange(draws))) * self.weights.sum()
        places, fresh = np.empty(draws, dtype=np.int64), 0
        for i, value in enumerate(x.tolist()):
            places[i] = min(bisect_right(drawn, value, 0, fresh), len(drawn) - 1)
            fresh += int(places[i] == fresh)
        return places

    def _partners(self, relevance: Float32s, chance: Float64s, x: Float64s, outside: bool) -> tuple[Int64s, Int64s, Bools]:
        """Positive, negative (of the category) and whether both exist.  relevance [n, held], x [n, 2] -> [n] each

        Over its chance to be held, so that the reservoir's preference for relevant images does not count twice.
        """
        weights = np.minimum(relevance, self.rules.max_relevance) / chance
        floor = np.where(relevance > 0, relevance, np.inf).min(1, keepdims=True)
        able = relevance - (0 if outside else floor) >= self.rules.min_gap
        positive = _choose(weights * able, x[:, 0])
        valid: Bools = np.any(able, axis=1)
        if outside:
            return positive, positive, valid
        least = np.take_along_axis(relevance, positive[:, None], axis=1)
        return positive, _choose(weights * (least - relevance >= self.rules.min_gap), x[:, 1]), valid


def _choose(weights: Float64s, x: Float64s) -> Int64s:
    """A column of each row, in proportion to its weight, by x in (0, 1).  weights [n or 1, k], x [n] -> [n]"""
    edges = np.cumsum(weights, axis=1)
    at = np.minimum(x * edges[:, -1], np.nextafter(edges[:, -1], 0))
    if len(edges) == 1:
        return np.asarray(np.searchsorted(edges[0], at, side="right"), dtype=np.int64)
    return np.asarray(np.argmax(edges > at[:, None], axis=1), dtype=np.int64)


def _uniform(x: Uint64s) -> Float64s:
    """Hashes to (0, 1): the middles of 2^52 equal parts."""
    return ((x >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52


def _unit(vectors: Float32s) -> Float32s:
    """Rows at length 1; zeros stay."""
    x = vectors.astype(np.float32, copy=False)
    length = np.linalg.norm(x, axis=1, keepdims=True)
    return np.asarray(x / np.where(length > 0, length, 1), dtype=np.float32)


def _blocks(x: Int64s, size: int) -> Iterator[Int64s]:
    return (x[i : i + size] for i in range(0, len(x), size))


def _check(vectors: Float32s, category: NDArray[np.generic], count: int, rules: Rules, out_of_class: float) -> None:
    if vectors.ndim != 2 or category.shape != vectors.shape[:1]:
        raise ValueError(f"vectors {vectors.shape} and category {category.shape}: give one row and one category per image")
    if not np.isfinite(vectors).all():
        raise ValueError("vectors: some are not finite; leave those images out")
    if count < 1:
        raise ValueError(f"count: {count} triplets; ask for one at least")
    if rules.buffer < 3:
        raise ValueError(f"buffer: {rules.buffer} images hold no triplet; give 3 at least")
    if not (0 < rules.max_relevance <= 1 and 0 < rules.min_gap <= 1 and 0 <= out_of_class <= 1):
        raise ValueError(
            "max_relevance and min_gap are above 0 and at most 1, out_of_class is from 0 to 1; got "
            f"{rules.max_relevance:g}, {rules.min_gap:g} and {out_of_class:g}"
        )


def _check_sizes(category: NDArray[np.generic], of_image: Int64s, sizes: Int64s, out_of_class: float) -> None:
    alone = np.flatnonzero(sizes == 1)
    if len(alone):
        example = category[of_image == alone[0]][0]
        raise ValueError(
            f"{len(alone)} categories have one image ({example}, ...), so no positive; leave them out or merge them"
        )
    if len(sizes) < 2 and out_of_class > 0:
        raise ValueError("no negative is possible from another category: there is one category only; set out_of_class to 0")
