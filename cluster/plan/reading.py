"""What a run asks of the storage that holds its shards: bytes, requests, and the pool on every node's disk."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction


@dataclass(frozen=True, slots=True)
class Reading:
    """`record_bytes` with tar headers; `block_bytes` fetched at once."""

    num_records: int
    record_bytes: float
    block_bytes: float
    lanes: int
    window: int  # records of a lane that are shuffled together

    @property
    def total_bytes(self) -> float:
        return self.num_records * self.record_bytes


def touched(nodes: int, lanes: int) -> list[list[float]]:
    """For each node, the shares of lanes that it reads: a sorted batch is cut into equal parts for lanes and for nodes.

    Node k has the batch from k / N to (k + 1) / N, lane l that from l / L to (l + 1) / L.
    """
    found = []
    for node in range(nodes):
        low, high = Fraction(node * lanes, nodes), Fraction((node + 1) * lanes, nodes)
        lanes_here = range(math.floor(low), math.ceil(high))
        parts = [min(high, Fraction(lane + 1)) - max(low, Fraction(lane)) for lane in lanes_here]
        found.append([float(part) for part in parts])
    return found


def amplification(reading: Reading, nodes: int) -> float:
    """Bytes that all nodes fetch in an epoch over the bytes there are, when no block is left from the epoch before.

    A node that takes a share f of a lane's records, m to a block, needs 1 - (1 - f)^m of its blocks; two nodes whose lanes
    are neighbours share the block at the seam.
    """
    per_block = max(1.0, reading.block_bytes / reading.record_bytes)
    shares = [share for node in touched(nodes, reading.lanes) for share in node]
    blocks = max(1.0, reading.total_bytes / reading.block_bytes)
    seams = (min(nodes, reading.lanes) - 1) / blocks
    needed = sum(1 - math.pow(1 - min(share, 1.0), per_block) for share in shares) / reading.lanes
    return min(float(nodes), needed + seams)


def pool_bytes(reading: Reading, nodes: int) -> float:
    """Blocks that a node must keep so that it fetches none twice: the windows of its lanes, and the blocks at their ends."""
    lanes = max(len(node) for node in touched(nodes, reading.lanes))
    return min(reading.total_bytes, lanes * (reading.window * reading.record_bytes + 2 * reading.block_bytes))
