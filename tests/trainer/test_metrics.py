"""Retrieval metrics against loops over sorted lists."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from trainer.metrics import RECALL_AT, means, recall_name, retrieval_sums


def by_loops(vectors: Tensor, group: list[int]) -> dict[str, float]:
    found: dict[str, list[float]] = {name: [] for name in [*map(recall_name, RECALL_AT), "map_at_r"]}
    for query in range(len(group)):
        others = [i for i in range(len(group)) if i != query]
        right = sum(group[i] == group[query] for i in others)
        if right == 0:
            continue
        ranked = sorted(others, key=lambda i: -float(vectors[query] @ vectors[i]))
        hits = [group[i] == group[query] for i in ranked]
        for k in RECALL_AT:
            found[recall_name(k)].append(float(any(hits[:k])))
        precisions = [sum(hits[: i + 1]) / (i + 1) if hits[i] else 0.0 for i in range(right)]
        found["map_at_r"].append(sum(precisions) / right)
    return {name: sum(values) / max(1, len(values)) for name, values in found.items()}


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_retrieval_equals_sorted_lists_whatever_the_chunk(seed: int, chunk: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    n = 40
    group = torch.randint(0, 9 if seed % 2 else 30, (n,), generator=generator) * 10**12
    vectors = torch.nn.functional.normalize(torch.randn(n, 6, generator=generator, dtype=torch.float64))
    sums = retrieval_sums(vectors, group, torch.arange(n), vectors, group, chunk=chunk)
    assert means(sums) == pytest.approx(by_loops(vectors, group.tolist()), abs=1e-12)


def test_shares_of_the_queries_add_up_to_the_whole() -> None:
    vectors = torch.randn(30, 5, dtype=torch.float64)
    group = torch.arange(30) // 4
    whole = retrieval_sums(vectors, group, torch.arange(30), vectors, group)
    halves = [retrieval_sums(vectors[p], group[p], torch.arange(30)[p], vectors, group) for p in (slice(0, 11), slice(11, 30))]
    for name, value in whole.items():
        assert float(halves[0][name] + halves[1][name]) == pytest.approx(float(value))


def test_without_queries_all_metrics_are_zero() -> None:
    sums = retrieval_sums(torch.eye(4), torch.arange(4), torch.arange(4), torch.eye(4), torch.arange(4))
    assert set(means(sums).values()) == {0.0}
