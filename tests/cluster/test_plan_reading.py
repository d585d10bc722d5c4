"""Blocks that nodes fetch, counted from the order of a run, against the plan's formula."""

from __future__ import annotations

import numpy as np
import pytest

from cluster.plan.reading import Reading, amplification, pool_bytes, touched
from pipelines.order import Order

RECORD_BYTES = 1000
MORE = [(2, 16, 256), (3, 16, 480), (4, 16, 256), (16, 16, 512), (24, 16, 960)]


def counted(reading: Reading, batch: int, nodes: int) -> float:
    """Blocks that every node touches in an epoch, each counted once a node, over the blocks there are. Shards of 4 blocks."""
    per_block = int(reading.block_bytes) // RECORD_BYTES
    per_shard = 4 * per_block
    order = Order([per_shard] * (reading.num_records // per_shard), seed=1, lanes=reading.lanes, window=reading.window)
    seen: list[set[tuple[int, int]]] = [set() for _ in range(nodes)]
    for position in range(0, reading.num_records, batch):
        count = min(batch, reading.num_records - position)
        for node in range(nodes):
            _, shard, row = order.slice(position, count, node, nodes)
            seen[node] |= set(zip(shard.tolist(), (row // per_block).tolist(), strict=True))
    blocks = reading.num_records // per_block
    return sum(map(len, seen)) / blocks


@pytest.mark.parametrize(
    ("nodes", "lanes", "batch"),
    [(1, 16, 256), (8, 16, 256), (32, 16, 1024), *(pytest.param(*case, marks=pytest.mark.acceptance) for case in MORE)],
)
def test_the_formula_is_what_the_order_touches(nodes: int, lanes: int, batch: int) -> None:
    reading = Reading(61_440, RECORD_BYTES, 16 * RECORD_BYTES, lanes, 128)
    assert amplification(reading, nodes) == pytest.approx(counted(reading, batch, nodes), rel=0.03)


def test_nodes_share_lanes_without_rest() -> None:
    for nodes, lanes in ((1, 64), (8, 64), (5, 7), (128, 64)):
        shares = touched(nodes, lanes)
        assert sum(map(sum, shares)) == pytest.approx(lanes)
        assert all(sum(node) == pytest.approx(lanes / nodes) for node in shares)


def test_a_node_keeps_the_windows_of_its_lanes_and_never_more_than_there_is() -> None:
    reading = Reading(10**8, 1e5, 8 * 2**20, 64, 2048)
    assert pool_bytes(reading, 1) == pytest.approx(64 * (2048 * 1e5 + 2 * 8 * 2**20))
    assert pool_bytes(reading, 8) == pytest.approx(pool_bytes(reading, 1) / 8)
    assert pool_bytes(Reading(10, 1e5, 8 * 2**20, 64, 2048), 8) == 1e6
    assert np.isfinite(amplification(reading, 1024))
