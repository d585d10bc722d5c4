"""Towers on several ranks, of which one has no row for a tower: the gradients of one process, and the same bits when asked."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from pipelines.batch import Batch
from tests.ranks import run_ranks
from tests.trainer.test_towers import IMAGES, LOSSES, VECTORS, batch_for, towers
from trainer import collectives, reproducible
from trainer.backward import backward, pieces_of
from trainer.objective import build_objective

BORDERS = {1: [0, 12], 2: [0, 3, 12], 3: [0, 1, 5, 12]}  # records
MICRO = [None, 1, 4]
CASES = [*itertools.product(["images", "vectors", "lonely"], range(len(LOSSES)), MICRO)]
FIXED = 2  # records of a piece


def slice_of(batch: Batch, start: int, end: int) -> Batch:
    """Records `start` to `end`, the images of all before the vectors of all."""
    rows = (batch.record >= start) & (batch.record < end)
    own: dict[str, Any] = {name: getattr(batch, name)[rows] for name in ("group", "uid", "view", "valid")}
    own |= {"record": batch.record[rows] - start, "sample": batch.sample[start:end]}
    if batch.vectors is None:
        return replace(batch, **own, images=batch.images[rows], draws=batch.draws[rows])
    assert batch.place is not None
    place = batch.place[rows].argsort().argsort()
    images = slice(start, end)
    return replace(
        batch, **own, images=batch.images[images], draws=batch.draws[images], vectors=batch.vectors[images], place=place
    )


def own_batch(kind: str) -> tuple[Batch, dict[str, Any]]:
    """This rank's share. lonely: the first three records have positives only, so that a rank has nothing for the anchors."""
    section = VECTORS if kind == "vectors" else IMAGES
    whole, border = batch_for(section), BORDERS[collectives.world()]
    if kind == "lonely":
        whole = replace(whole, view=torch.where(whole.record < 3, 1, whole.view))
    return slice_of(whole, border[collectives.rank()], border[collectives.rank() + 1]), section


def every_case() -> list[tuple[float, list[Tensor]]]:
    """Loss and all gradients on this rank."""
    found = []
    for kind, loss, micro in CASES:
        batch, section = own_batch(kind)
        encoder, objective = collectives.data_parallel(towers(section)), build_objective(LOSSES[loss]).double()
        value, _ = backward(encoder, objective, batch.images.double() / 255, batch, pieces=pieces_of(batch, micro))
        grads = [p.grad for p in [*encoder.parameters(), *objective.parameters()]]
        assert all(grad is not None for grad in grads)
        found.append((float(value), [grad for grad in grads if grad is not None]))
    return found


@pytest.fixture(scope="module")
def expected() -> list[tuple[float, list[Tensor]]]:
    return every_case()


@pytest.mark.parametrize("world", [1, 2, 3])
def test_towers_on_any_number_of_ranks_give_the_gradients_of_one_process(world: int, expected: Any) -> None:
    ranks = run_ranks(world, every_case) if world > 1 else [every_case()]
    for case in range(len(CASES)):
        value, grads = expected[case - case % len(MICRO)]  # the whole batch at once in one process
        for rank in ranks:
            assert rank[case][0] == pytest.approx(value, rel=1e-12)
            for found, grad in zip(rank[case][1], grads, strict=True):
                torch.testing.assert_close(found, grad, rtol=1e-9, atol=1e-13)


def fixed_gradients(border: list[int]) -> list[list[Tensor]]:
    """With `train.reproducible`, in float32: gradients of both kinds of towers, for images and for vectors."""
    found = []
    for section in (IMAGES, VECTORS):
        batch = slice_of(batch_for(section), border[collectives.rank()], border[collectives.rank() + 1])
        encoder, objective = towers(section).float(), build_objective(LOSSES[0])
        pieces = pieces_of(batch, FIXED)
        assert pieces is not None
        with reproducible.kernels():
            images = reproducible.prepared(batch, pieces, lambda part: part.images.float() / 255)
            step = reproducible.Step(1, 0)
            reproducible.backward(encoder, objective, images, batch, step, keys=towers(section).float())
        found.append([p.grad.clone() for p in encoder.parameters() if p.grad is not None])
        assert len(found[-1]) == len(list(encoder.parameters()))
    return found


def test_reproducible_gradients_are_the_same_bits_on_one_rank_and_on_two() -> None:
    alone = fixed_gradients([0, 12])
    for rank in run_ranks(2, fixed_gradients, [0, 4, 12]):
        for one, other in zip(itertools.chain(*alone), itertools.chain(*rank), strict=True):
            assert torch.equal(one, other)
