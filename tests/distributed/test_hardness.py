"""The shares of hard, semi-hard and easy triplets: those of a loop, on any number of ranks."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.ranks import run_ranks
from trainer import collectives
from trainer.hardness import MOST_POSITIVES
from trainer.objective import build_objective

NAMES = ("hard_fraction", "semi_hard_fraction", "easy_fraction")
MINERS = ["all", "batch_hard", "semi_hard", "hardest", "distance_weighted"]
DISTANCES = ["euclidean", "squared_euclidean", "cosine"]
CASES = [*itertools.product(MINERS, DISTANCES), *itertools.product([None], DISTANCES)]
MARGIN = 0.4


def batch(miner: str | None) -> tuple[Tensor, dict[str, Tensor]]:
    """Labelled: classes of 1 to 7 images, one of them unreadable. Given: records of an anchor, a positive, 1 to 3 negatives."""
    generator = torch.Generator().manual_seed(2)
    if miner is None:
        views = [torch.arange(3 + k % 3) for k in range(10)]
        record = torch.cat([torch.full((len(v),), k) for k, v in enumerate(views)])
        ids = {"group": torch.arange(len(record)), "view": torch.cat(views), "record": record}
    else:
        group = torch.cat([torch.full((k,), k) for k in range(1, 8)])
        group = group[torch.randperm(len(group), generator=generator)]
        ids = {"group": group, "uid": torch.randperm(len(group), generator=generator) + 50}
        ids["record"] = torch.arange(len(group))
    ids["valid"] = torch.arange(len(ids["record"])) != 6
    x = torch.randn(len(ids["record"]), 6, dtype=torch.float64, generator=generator)
    x += 0.8 * torch.randn(50, 6, dtype=torch.float64, generator=generator)[ids["record" if miner is None else "group"]]
    return x, ids


def distance(a: Tensor, b: Tensor, kind: str) -> float:
    a, b = a / a.norm(), b / b.norm()
    if kind == "cosine":
        return float(1 - a @ b)
    squared = float(((a - b) ** 2).sum())
    return squared if kind == "squared_euclidean" else squared**0.5


def triplets(miner: str | None, ids: dict[str, Tensor]) -> list[tuple[int, int, int]]:
    there = [row for row in range(len(ids["record"])) if ids["valid"][row]]
    if miner is None:
        row = {(int(ids["record"][i]), int(ids["view"][i])): i for i in there}
        wanted = [(row.get((r, 0)), row.get((r, 1)), i) for (r, view), i in row.items() if view >= 2]
        return [(a, p, n) for a, p, n in wanted if a is not None and p is not None]
    found = []
    by_uid = sorted(there, key=lambda i: int(ids["uid"][i]))
    for a in there:
        same = [i for i in by_uid if ids["group"][i] == ids["group"][a] and i != a]
        found += [(a, p, n) for p in same[:MOST_POSITIVES] for n in there if ids["group"][n] != ids["group"][a]]
    return found


def expected(miner: str | None, kind: str) -> list[float]:
    x, ids = batch(miner)
    counts = [0, 0, 0]
    for a, p, n in triplets(miner, ids):
        d_ap, d_an = distance(x[a], x[p], kind), distance(x[a], x[n], kind)
        counts[0 if d_an < d_ap else 1 if d_an < d_ap + MARGIN else 2] += 1
    assert min(counts) > 0
    return [count / sum(counts) for count in counts]


def computed() -> list[list[float]]:
    """On this rank's part, which is cut unevenly and between records."""
    found = []
    for miner, kind in CASES:
        x, ids = batch(miner)
        border = [0, 4, 10 if miner is None else len(x)]
        first, end = (0, border[-1]) if collectives.world() == 1 else border[collectives.rank() : collectives.rank() + 2]
        part = (ids["record"] >= first) & (ids["record"] < end)
        local: dict[str, Any] = {name: value[part] for name, value in ids.items()}
        local["record"] = local["record"] - first
        options = {} if miner is None else {"miner": miner}
        objective = build_objective({"name": "triplet", "margin": MARGIN, "distance": kind, "chunk_bytes": 5000, **options})
        _, stats = objective(x[part].requires_grad_(), local.pop("group"), **local)
        found.append([float(stats[name]) for name in NAMES])
    return found


@pytest.mark.parametrize("world", [1, 2])
def test_shares_are_those_of_a_loop_on_any_number_of_ranks(world: int) -> None:
    ranks = run_ranks(world, computed) if world > 1 else [computed()]
    for found in ranks:
        for case, shares in zip(CASES, found, strict=True):
            assert shares == pytest.approx(expected(*case), abs=1e-12), case
            assert sum(shares) == pytest.approx(1), case


def test_nobody_counts_what_nobody_looks_at() -> None:
    x, ids = batch("all")
    _, stats = build_objective({"name": "triplet", "miner": "semi_hard"})(x, ids["group"], with_stats=False)
    assert not set(NAMES) & set(stats)
