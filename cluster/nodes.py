"""On which nodes the ranks of a run are, and how these differ."""

from __future__ import annotations

import itertools
import os
import platform
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from trainer import collectives

BYTES = 192  # of a node's description on the wire


@dataclass(frozen=True, slots=True)
class Node:
    name: str
    cpu: str  # how many cores of which model


def nodes_of_ranks(name: str, device: torch.device) -> list[Node]:
    """The node of every rank, in the order of ranks, of which this one's is called `name`. Collective: every rank calls it."""
    text = f"{name[:80]}\n{os.cpu_count()} x {_model()}".encode()[:BYTES]
    mine = torch.zeros(1, BYTES, dtype=torch.uint8)
    mine[0, : len(text)] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    every = collectives.gather(mine.to(device), [1] * collectives.world()).cpu()
    texts = [bytes(row.tolist()).rstrip(b"\0").decode(errors="replace") for row in every]
    return [Node(*text.split("\n", 1)) for text in texts]


def describe(nodes: Sequence[Node]) -> str:
    """`a x 8, b x 8`, in the order of ranks."""
    return ", ".join(f"{name} x {len(list(same))}" for name, same in itertools.groupby(node.name for node in nodes))


def oddities(nodes: Sequence[Node]) -> list[str]:
    """What makes a run slower than it could be, one line each."""
    found = []
    runs = Counter(name for name, _ in itertools.groupby(node.name for node in nodes))
    torn = [name for name, count in runs.items() if count > 1]
    if torn:
        found.append(f"the ranks of {', '.join(torn)} are not neighbours, so more of each gather crosses the network")
    kinds = {node.cpu: node.name for node in reversed(nodes)}
    if len(kinds) > 1:
        of_kinds = "; ".join(f"{name}: {cpu}" for cpu, name in reversed(kinds.items()))
        found.append(f"nodes with different CPUs ({of_kinds}): all wait for the one that decodes slowest, see train/wait_share")
    return found


def _model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
