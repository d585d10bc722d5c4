"""Rows given as vectors and targets take part in the loss as if an encoder had made them, without gradient."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pipelines.batch import Batch
from tests.trainer.test_backward import Small, batch_of
from trainer.backward import backward, encode, pieces_of
from trainer.evaluate import embed
from trainer.objective import build_objective


def image_and_text(n: int = 24) -> Batch:
    """Pairs of an image and a vector of 6 numbers, the vector first in every other pair."""
    whole = batch_of(n, 2)
    is_vector = torch.arange(n) % 4 >= 2
    is_vector = torch.where(whole.record % 3 == 0, torch.arange(n) % 2 == 0, is_vector ^ (torch.arange(n) % 2 == 0))
    place = torch.where(is_vector, (~is_vector).sum() + is_vector.cumsum(0) - 1, (~is_vector).cumsum(0) - 1)
    vectors = torch.randn(int(is_vector.sum()), 6, generator=torch.Generator().manual_seed(2))
    images, draws = whole.images[~is_vector], whole.draws[~is_vector]
    return replace(whole, images=images, draws=draws, vectors=vectors, place=place)


def rows(batch: Batch, encoded: Tensor) -> Tensor:
    """One row after the other, by hand."""
    assert batch.place is not None
    assert batch.vectors is not None
    given = batch.vectors.double()
    k = len(encoded)
    return torch.stack([encoded[i] if i < k else given[i - k] for i in batch.place.tolist()])


@pytest.mark.parametrize("loss", [{"name": "info_nce", "learnable": True}, {"name": "triplet", "miner": "batch_hard"}])
@pytest.mark.parametrize("micro_batch", [None, 1, 5])
def test_given_vectors_are_rows_like_any_other(loss: dict[str, Any], micro_batch: int | None) -> None:
    torch.manual_seed(0)
    encoder, batch = Small().double(), image_and_text()
    images, objective = batch.images.double() / 255, build_objective(loss).double()
    value, _ = backward(encoder, objective, images, batch, pieces=pieces_of(batch, micro_batch))
    found = [p.grad.clone() for p in encoder.parameters() if p.grad is not None]
    encoder.zero_grad()
    expected, _ = objective(
        rows(batch, encoder(images)), batch.group, uid=batch.uid, view=batch.view, record=batch.record, valid=batch.valid
    )
    expected.backward()
    assert float(value) == pytest.approx(float(expected.detach()), rel=1e-12)
    for grad, parameter in zip(found, encoder.parameters(), strict=True):
        torch.testing.assert_close(grad, parameter.grad, rtol=1e-10, atol=1e-14)


def test_pieces_hold_images_of_whole_records() -> None:
    batch = image_and_text()
    pieces = pieces_of(batch, 5)
    assert pieces is not None
    assert sum(pieces) == len(batch.images)


def test_momentum_keys_are_joined_too() -> None:
    torch.manual_seed(0)
    encoder, batch = Small().double(), image_and_text()
    images, objective = batch.images.double() / 255, build_objective({"name": "info_nce"}).double()
    keys = encode(encoder, images, None, None)
    own = {"uid": batch.uid, "view": batch.view, "record": batch.record, "valid": batch.valid}
    value, _ = backward(encoder, objective, images, batch, keys=keys)
    expected, _ = objective(rows(batch, encoder(images)), batch.group, keys=rows(batch, keys), **own)
    assert float(value) == pytest.approx(float(expected.detach()), rel=1e-12)


def test_targets_of_the_batch_reach_the_loss() -> None:
    torch.manual_seed(0)
    encoder, batch = Small().double(), batch_of(24, 1)
    images, objective = batch.images.double() / 255, build_objective({"name": "regress", "kind": "cosine"}).double()
    target = torch.randn(24, 6)
    value, _ = backward(encoder, objective, images, replace(batch, target=target))
    expected = 1 - F.cosine_similarity(encoder(images), target.double())
    assert float(value) == pytest.approx(float(expected.mean().detach()), rel=1e-12)


def test_evaluation_has_them_at_length_one() -> None:
    torch.manual_seed(0)
    encoder, batch = Small().double(), image_and_text()
    found = embed(encoder, [batch], lambda b: b.images.double() / 255)
    torch.testing.assert_close(found.vectors, F.normalize(rows(batch, encoder(batch.images.double() / 255)), dim=1).detach())


def test_a_wrong_length_names_the_setting() -> None:
    batch = image_and_text()
    assert batch.vectors is not None
    wrong = replace(batch, vectors=batch.vectors[:, :4])
    with pytest.raises(ValueError, match=r"encoder\.dim is 6, but the vectors of the data have 4"):
        backward(Small().double(), build_objective({"name": "info_nce"}).double(), batch.images.double() / 255, wrong)
