"""DDP, micro-batches and uneven ranks: the gradients of one process over the whole batch, for encoder and loss."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from pipelines.batch import Batch
from tests.ranks import run_ranks
from tests.trainer.test_backward import Small, batch_of
from trainer import collectives
from trainer.backward import backward, pieces_of
from trainer.objective import build_objective

LOSSES: list[dict[str, Any]] = [
    {"name": "info_nce", "learnable": True},
    {"name": "info_nce", "queries": "anchors", "candidates": "other_view", "symmetric": True},
    {"name": "sup_con"},
    {"name": "triplet", "miner": "batch_hard", "normalize": False},
]
MICRO = [None, 1, 4, 5]
BORDERS = {1: [0, 30], 2: [0, 8, 30], 3: [0, 2, 18, 30]}  # rows; records are pairs


def slice_of(batch: Batch, start: int, end: int) -> Batch:
    rows = {name: getattr(batch, name)[start:end] for name in ("images", "group", "uid", "view", "valid", "draws")}
    return replace(
        batch, **rows, record=batch.record[start:end] - batch.record[start], sample=batch.sample[start // 2 : end // 2]
    )


def every_case() -> list[tuple[float, list[Tensor]]]:
    """Loss and all gradients on this rank, for every loss and micro-batch size."""
    whole = batch_of(30, 2)
    border = BORDERS[collectives.world()]
    batch = slice_of(whole, border[collectives.rank()], border[collectives.rank() + 1])
    found = []
    for options, micro in itertools.product(LOSSES, MICRO):
        torch.manual_seed(4)
        encoder = collectives.data_parallel(Small().double())
        objective = build_objective(options).double()
        loss, _ = backward(encoder, objective, batch.images.double() / 255, batch, pieces=pieces_of(batch, micro))
        grads = [p.grad for p in [*encoder.parameters(), *objective.parameters()] if p.grad is not None]
        found.append((float(loss), grads))
    return found


@pytest.fixture(scope="module")
def expected() -> list[tuple[float, list[Tensor]]]:
    return every_case()


@pytest.mark.parametrize("world", [1, 2, 3])
def test_every_split_of_the_batch_gives_the_gradients_of_one_process(world: int, expected: Any) -> None:
    ranks = run_ranks(world, every_case) if world > 1 else [every_case()]
    for case in range(len(LOSSES) * len(MICRO)):
        value, grads = expected[case - case % len(MICRO)]  # the whole batch at once in one process
        for rank in ranks:
            assert rank[case][0] == pytest.approx(value, rel=1e-12)
            assert len(rank[case][1]) == len(grads) > 0
            for found, grad in zip(rank[case][1], grads, strict=True):
                torch.testing.assert_close(found, grad, rtol=1e-10, atol=1e-14)
