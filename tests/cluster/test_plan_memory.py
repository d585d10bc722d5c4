"""The loss's memory, measured in processes of their own, against the plan's formula."""

from __future__ import annotations

from typing import Any

import pytest

from cluster.plan.facts import Told, data_facts, loss_facts
from cluster.plan.memory import Holding, largest_piece, loss_bytes, memory
from cluster.plan.models import published
from cluster.plan.wire import LossFacts, Share
from configs.load import parse_config
from tests.benchmarks.cases import DIM
from tests.benchmarks.measure import apart

LOSSES: list[dict[str, Any]] = [
    {"name": "sup_con"},
    {"name": "triplet", "miner": "batch_hard"},
    {"name": "info_nce", "queries": "anchors", "candidates": "other_view", "symmetric": True},
]


def facts_of(loss: dict[str, Any]) -> LossFacts:
    config = parse_config(
        {"name": "a", "data": {"train": "x"}, "loss": loss, "train": {"steps": 1}, "cluster": {"workers": 1}},
    )
    (found,) = loss_facts(config, data_facts(config, Told(samples=100)), DIM, cpu=True)
    return found


@pytest.mark.acceptance
@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: "-".join(map(str, loss.values())))
def test_one_process_needs_what_the_formula_says(loss: dict[str, Any]) -> None:
    rows = 16384
    extra = min(apart("ours", loss=loss, size=rows)[1] for _ in range(2))  # buffers of threads come and go: 30 MiB
    expected = loss_bytes(facts_of(loss), rows, rows)
    print(f"\n{loss}: {extra / 2**20:.0f} MiB measured, {expected / 2**20:.0f} MiB planned")
    assert extra == pytest.approx(expected, rel=0.2)


def test_memory_is_linear_in_the_batch_and_in_what_is_remembered() -> None:
    small = facts_of({"name": "sup_con"})
    large = facts_of({"name": "sup_con", "memory": 100_000})
    once, twice = (loss_bytes(small, 256, candidates) - small.chunk_bytes for candidates in (2**17, 2**18))
    assert twice == pytest.approx(2 * once, rel=0.01)
    assert loss_bytes(large, 256, 2**17) - loss_bytes(small, 256, 2**17) > 4 * 100_000 * DIM * 4


def test_the_micro_batch_that_is_named_is_the_largest_that_fits() -> None:
    encoder = published("vit-b16", 224, 512, "bf16")
    held = Holding(encoder, [facts_of({"name": "sup_con"})], 3 * 224**2, moments=2, averages=0, autocast=True)
    share = Share(4096, 8192, 8192)
    have = 80e9
    piece = largest_piece(held, share, 65536, have, unit=1, images=2)
    assert piece is not None
    assert memory(held, share, 65536, 2 * piece).total <= have < memory(held, share, 65536, 4 * piece).total
    assert largest_piece(held, share, 65536, 1e9, unit=1, images=2) is None
    assert largest_piece(held, share, 65536, 1e13, unit=1, images=2) == share.records
    parts = memory(held, share, 65536, 2 * piece)
    assert parts.total == pytest.approx(parts.weights + parts.activations + parts.loss + parts.images + parts.other)
