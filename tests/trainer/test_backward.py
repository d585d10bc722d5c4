"""Micro-batches give the gradient of the whole batch."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import Tensor, nn

from configs.schema import Optim
from pipelines.batch import NUM_DRAWS, Batch
from trainer.backward import backward, pieces_of
from trainer.objective import build_objective, unit
from trainer.optim import Average
from trainer.schedules import learning_rate


class Small(nn.Module):
    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(48, 16), nn.GELU(), nn.Dropout(dropout), nn.Linear(16, 6))

    def forward(self, images: Tensor) -> Tensor:
        return unit(self.net(images))


def batch_of(n: int, per_record: int) -> Batch:
    generator = torch.Generator().manual_seed(5)
    record = torch.arange(n) // per_record
    return Batch(
        images=torch.randint(0, 256, (n, 3, 4, 4), generator=generator, dtype=torch.uint8),
        group=record % 5,
        uid=torch.randperm(n, generator=generator),
        view=torch.arange(n) % per_record,
        record=record,
        valid=torch.ones(n, dtype=torch.bool),
        draws=torch.zeros(n, NUM_DRAWS),
        sample=torch.zeros(n // per_record, 3, dtype=torch.int64),
    )


LOSSES = [
    {"name": "info_nce", "learnable": True},
    {"name": "info_nce", "queries": "anchors", "candidates": "other_view", "symmetric": True},
    {"name": "sup_con"},
    {"name": "triplet", "miner": "batch_hard"},
    {"name": "triplet", "miner": "semi_hard", "normalize": False},
]


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: "-".join(map(str, loss.values())))
@pytest.mark.parametrize("micro_batch", [1, 3, 4, 12, 50])
def test_micro_batches_equal_the_whole_batch(loss: dict[str, object], micro_batch: int) -> None:
    torch.manual_seed(0)
    whole = Small().double()
    split = copy.deepcopy(whole)
    batch = batch_of(24, 2)
    images = batch.images.double() / 255
    objectives = build_objective(loss).double(), build_objective(loss).double()
    expected, _ = backward(whole, objectives[0], images, batch)
    value, _ = backward(split, objectives[1], images, batch, pieces=pieces_of(batch, micro_batch))
    assert float(value) == pytest.approx(float(expected), rel=1e-12)
    pairs = [*zip(whole.parameters(), split.parameters(), strict=True)]
    pairs += [*zip(objectives[0].parameters(), objectives[1].parameters(), strict=True)]
    for one, other in pairs:
        assert one.grad is not None
        assert other.grad is not None
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-10, atol=1e-14)


def test_dropout_draws_the_same_numbers_in_both_passes() -> None:
    torch.manual_seed(0)
    encoder = Small(dropout=0.5).double()
    batch, objective = batch_of(24, 2), build_objective({"name": "sup_con"}).double()
    images = batch.images.double() / 255
    torch.manual_seed(11)
    backward(encoder, objective, images, batch, pieces=[10, 14])
    found = [p.grad.clone() for p in encoder.parameters() if p.grad is not None]
    encoder.zero_grad()
    torch.manual_seed(11)
    vectors = torch.cat([encoder(part) for part in images.split([10, 14])])  # one graph, the same pieces and random state
    loss, _ = objective(vectors, batch.group, uid=batch.uid, view=batch.view, record=batch.record, valid=batch.valid)
    loss.backward()
    for one, parameter in zip(found, encoder.parameters(), strict=True):
        torch.testing.assert_close(one, parameter.grad, rtol=1e-10, atol=1e-14)


def test_no_record_is_split() -> None:
    assert pieces_of(batch_of(24, 3), 3) == [9, 9, 6]
    assert pieces_of(batch_of(24, 2), None) is None


def test_the_learning_rate_warms_up_and_comes_down() -> None:
    optim = Optim(lr=2.0, warmup_steps=10, final_lr=0.1)
    rates = [learning_rate(optim, step, 100) for step in range(1, 101)]
    assert rates[0] == pytest.approx(0.2)
    assert rates[9] == rates[10] == 2.0
    assert all(a >= b for a, b in itertools.pairwise(rates[10:]))
    assert rates[-1] == pytest.approx(0.2, abs=0.01)


def test_the_average_forgets_the_start_and_has_no_gradient() -> None:
    layer = nn.Linear(2, 2)
    average = Average(layer, 0.99)
    with torch.no_grad():
        layer.weight.fill_(1.0)
    for step in range(1, 2000):
        average.update(step)
    torch.testing.assert_close(average.module.weight, layer.weight, rtol=1e-4, atol=1e-4)
    assert not average.module.weight.requires_grad
