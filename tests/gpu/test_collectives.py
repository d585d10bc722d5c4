"""The collectives over NCCL. One GPU is one rank, which has nothing to send, so here it is made to ask NCCL all the same."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.gpu.card import CARD, needs_card
from trainer import collectives, random_state

pytestmark = needs_card
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.uint8]


class Crowd(int):
    """1 that says it is more."""

    def __eq__(self, other: object) -> bool:
        return False

    def __gt__(self, other: int) -> bool:
        return True

    __hash__ = int.__hash__


@pytest.fixture(autouse=True)
def _nccl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    torch.cuda.set_device(0)
    collectives.join(0, 1, tmp_path / "store", device=torch.device("cuda", 0), timeout_s=60)
    monkeypatch.setattr(collectives, "world", lambda: Crowd(1))
    yield
    collectives.leave()


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_are_gathered_and_added_up(dtype: torch.dtype) -> None:
    rows = (torch.arange(12, device=CARD) % 5).to(dtype).view(4, 3)
    assert collectives.sizes(4, CARD) == [4]
    gathered = collectives.gather(rows, [4])
    assert gathered.data_ptr() != rows.data_ptr()  # it went through NCCL
    assert torch.equal(gathered, rows)
    assert torch.equal(collectives.gather(rows[:0], [0]), rows[:0])
    assert torch.equal(collectives.scatter_sum(rows, [4]), rows)
    assert torch.equal(collectives.total(rows), rows)
    assert torch.equal(collectives.largest(rows), rows)
    assert torch.equal(collectives.gather(rows.T, [3]), rows.T)  # not contiguous


def test_rank_0_tells_the_others() -> None:
    collectives.broadcast([torch.ones(3, device=CARD), nn.Parameter(torch.ones(2, device=CARD))])
    assert collectives.from_first(lambda: {"a": [1, "b"]}) == {"a": [1, "b"]}
    with pytest.raises(ValueError, match="of rank 0"):
        collectives.from_first(lambda: int("of rank 0"))


def test_ddp_leaves_the_gradient_of_one_rank_as_it_is() -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(5, 3).to(CARD), torch.randn(7, 5, device=CARD)
    layer(x).square().sum().backward()
    expected = [p.grad.clone() for p in layer.parameters() if p.grad is not None]
    layer.zero_grad()
    wrapped = collectives.data_parallel(layer)
    assert isinstance(wrapped, nn.parallel.DistributedDataParallel)
    wrapped(x).square().sum().backward()
    for p, grad in zip(layer.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, grad)


def test_the_generators_of_all_ranks_travel() -> None:
    states = random_state.gathered(CARD)
    assert {name: state.shape[0] for name, state in states.items()} == {"cpu": 1, "cuda": 1}
    expected = torch.rand(3), torch.rand(3, device=CARD)
    random_state.restore(states, CARD)
    assert torch.equal(torch.rand(3), expected[0])
    assert torch.equal(torch.rand(3, device=CARD), expected[1])
