"""The order of the stream, compared with a slow loop written from its definition."""

from __future__ import annotations

import numpy as np
import pytest

from pipelines.hashing import GOLDEN, hash_bytes, hash_entity, hash_ints, mix, permutation
from pipelines.order import Order

MASK = 2**64 - 1


def slow_mix(x: int) -> int:
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


def slow_hash(*parts: int) -> int:
    state = 0
    for part in parts:
        state = (slow_mix(state ^ slow_mix((part + int(GOLDEN)) & MASK)) + int(GOLDEN)) & MASK
    return slow_mix(state)


def slow_permutation(n: int, *key: int) -> list[int]:
    start = slow_hash(*key)
    return sorted(range(n), key=lambda i: slow_mix((start + (i + 1) * int(GOLDEN)) & MASK))


def slow_sample(sizes: list[int], seed: int, lanes: int, window: int, position: int) -> tuple[int, int, int, int, int]:
    """(epoch, lane, offset, shard, row) of one position, as in the design."""
    total = sum(sizes)
    epoch, place = divmod(position, total)
    lane, offset = place % lanes, place // lanes
    lengths = [-(-(total - one) // lanes) if one < total else 0 for one in range(lanes)]
    stagger = slow_hash(seed, 2, epoch, lane) % window
    block = (offset + stagger) // window
    begin, end = max(0, block * window - stagger), min(lengths[lane], (block + 1) * window - stagger)
    inside = slow_permutation(end - begin, seed, 3, epoch, lane, block)[offset - begin]
    index = sum(lengths[:lane]) + begin + inside
    for shard in slow_permutation(len(sizes), seed, 1, epoch):
        if index < sizes[shard]:
            return epoch, lane, offset, shard, index
        index -= sizes[shard]
    raise AssertionError


def rows_of(order: Order, position: int, batch: int, rank: int = 0, world: int = 1) -> list[tuple[int, int, int]]:
    return list(zip(*(part.tolist() for part in order.slice(position, batch, rank, world)), strict=True))


def test_splitmix_gives_the_published_numbers() -> None:
    # The first outputs of splitmix64 seeded with 1234567, as given with its reference implementation.
    steps = np.uint64(1234567) + np.arange(1, 4, dtype=np.uint64) * GOLDEN
    assert mix(steps).tolist() == [6457827717110365317, 3203168211198807973, 9817491932198370423]


def test_hashes_are_pinned() -> None:
    assert hash_ints(7, 1, 2).tolist() == [slow_hash(7, 1, 2)] == [17225845134993757142]
    assert permutation(8, 7, 1).tolist() == slow_permutation(8, 7, 1) == [4, 7, 0, 6, 3, 1, 5, 2]
    assert hash_bytes(b"nearfar") == 4468525208982136249
    assert hash_entity("cat") == 6800505362330424554


def test_order_is_pinned() -> None:
    order = Order([5, 0, 7, 30, 1], seed=3, lanes=4, window=5)
    assert rows_of(order, 100, 6) == [(2, 0, 0), (2, 3, 6), (2, 3, 22), (2, 3, 19), (2, 2, 1), (2, 2, 4)]


@pytest.mark.parametrize(("lanes", "window"), [(1, 1), (4, 5), (3, 100), (64, 2), (7, 1)])
def test_order_agrees_with_the_definition(lanes: int, window: int) -> None:
    sizes = [5, 0, 7, 13, 1]
    order = Order(sizes, seed=11, lanes=lanes, window=window)
    for position, batch in ((0, 26), (20, 30), (73, 9)):
        slow = sorted(slow_sample(sizes, 11, lanes, window, p) for p in range(position, position + batch))
        assert rows_of(order, position, batch) == [(epoch, shard, row) for epoch, _, _, shard, row in slow]


def test_every_sample_comes_once_an_epoch_for_any_schedule() -> None:
    rng = np.random.default_rng(0)
    for _ in range(30):
        sizes = rng.integers(0, 40, rng.integers(1, 9))
        sizes[0] += 1
        total = int(sizes.sum())
        order = Order(sizes, seed=int(rng.integers(2**62)), lanes=int(rng.integers(1, 20)), window=int(rng.integers(1, 30)))
        seen: list[tuple[int, int, int]] = []
        position = 0
        while position < 3 * total:
            batch = min(int(rng.integers(1, 50)), 3 * total - position)
            world = int(rng.integers(1, 7))
            for rank in range(world):
                seen += rows_of(order, position, batch, rank, world)
            position += batch
        expected = [(epoch, shard, row) for epoch in range(3) for shard in range(len(sizes)) for row in range(sizes[shard])]
        assert sorted(seen) == expected


def test_ranks_together_are_the_batch_in_order() -> None:
    order = Order([100, 50], seed=5, lanes=8, window=16)
    for world in (1, 2, 3, 5, 8):
        parts = [row for rank in range(world) for row in rows_of(order, 130, 40, rank, world)]
        assert parts == rows_of(Order([100, 50], seed=5, lanes=8, window=16), 130, 40)


def test_epochs_and_seeds_differ() -> None:
    order = Order([1000], seed=1, lanes=8, window=64)
    first = [row for _, _, row in rows_of(order, 0, 1000)]
    assert [row for _, _, row in rows_of(order, 1000, 1000)] != first
    assert [row for _, _, row in rows_of(Order([1000], seed=2, lanes=8, window=64), 0, 1000)] != first


def test_neighbours_in_one_epoch_are_not_neighbours_in_the_next() -> None:
    # A shuffle by sorting hash ^ mix(i) would keep about half of all neighbours together.
    n = 4000
    together = 0
    for epoch in range(20):
        one, two = permutation(n, 9, 3, epoch), permutation(n, 9, 3, epoch + 1)
        place = np.argsort(two)
        together += int((np.abs(np.diff(place[one])) == 1).sum())
    expected = 20 * 2 * (n - 1) / n  # two of n places are next to a given one
    assert abs(together - expected) < 5 * np.sqrt(expected)


def test_a_billion_samples_are_within_reach() -> None:
    order = Order(np.full(100_000, 10_000), seed=1)
    epoch, shard, row = order.slice(10**12 + 123, 64)
    assert (epoch == 1000).all()
    assert len(set(zip(shard.tolist(), row.tolist(), strict=True))) == 64
    assert shard.dtype == row.dtype == np.int64


def test_ten_billion_samples_are_addressed_as_the_definition_says() -> None:
    sizes = [10_000_000] * 999 + [10_000_017]  # positions and rows above 2**31, shards of different sizes
    order = Order(sizes, seed=3, lanes=64, window=2048)
    assert order.num_samples == 10_000_000_017
    for position in (0, 2**31 + 5, 9_999_999_999, 10**10 + 16, 123 * 10**11 + 7):
        epoch, _, _, shard, row = slow_sample(sizes, 3, 64, 2048, position)
        assert rows_of(order, position, 1) == [(epoch, shard, row)]
    parts = [rows_of(order, 7 * 10**10, 10_000, rank, 7) for rank in range(7)]
    seen = [sample for part in parts for sample in part]
    assert len(set(seen)) == 10_000
    assert all(0 <= row < sizes[shard] for _, shard, row in seen)


def test_a_part_of_a_batch_is_that_part() -> None:
    order = Order([100, 50], seed=5, lanes=8, window=16)
    whole = rows_of(order, 130, 40)
    assert list(zip(*(part.tolist() for part in order.part(130, 40, 7, 33)), strict=True)) == whole[7:33]


def test_nothing_to_order_is_refused() -> None:
    with pytest.raises(ValueError, match="nothing to order"):
        Order([0, 0], seed=1)
