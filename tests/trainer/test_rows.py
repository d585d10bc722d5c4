"""What a loss is handed: negatives, how many there are, and distances, against masks and torch's own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from trainer.distance import Distance, distances
from trainer.objective import Objective
from trainer.rows import RowLoss, Rows, Terms

KINDS: list[Distance] = ["cosine", "squared_euclidean", "euclidean"]


class Barred(RowLoss):
    """Softplus of negative similarities and a hinge of negative distances, on what comes barred."""

    def __init__(self, kind: Distance) -> None:
        super().__init__()
        self.kind: Distance = kind

    def forward(self, rows: Rows) -> Terms:
        hinges = F.relu(1.3 - rows.negative_distances(self.kind)).square()
        return Terms(F.softplus(5 * rows.negatives()).sum() + hinges.sum() + rows.dense().sum(), rows.num_negatives.sum())


class Masked(Barred):
    """The same by masks."""

    def forward(self, rows: Rows) -> Terms:
        near = F.softplus(5 * rows.dense()).where(rows.negative, 0.0).sum()
        far = F.relu(1.3 - rows.distance(self.kind)).square().where(rows.negative, 0.0).sum()
        return Terms(near + far + rows.dense().sum(), rows.negative.sum())


def batch(case: str) -> dict[str, Tensor]:
    """Ids of 24 rows: plain; with duplicates, invalid rows and explicit negatives; of one class; each its own."""
    n = torch.arange(24)
    if case == "one class":
        return {"group": n * 0}
    if case == "all apart":
        return {"group": n}
    ids = {"group": n // 3}
    if case == "mixed":
        explicit = n % 3 == 2
        ids["group"] = torch.where(explicit, 100 + n // 6, n // 6)
        ids |= {"view": n % 3, "record": n // 3, "uid": torch.where(n % 7 == 0, 0, n), "valid": (n % 5 != 0).long()}
    return ids


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("guard", [{}, {"ignore_above": 0.5}])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("case", ["plain", "mixed", "one class", "all apart"])
def test_barred_negatives_give_what_masks_give(case: str, normalize: bool, guard: dict[str, Any], kind: Distance) -> None:
    x = torch.randn(24, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    found = []
    for loss in (Barred(kind), Masked(kind)):
        leaf = x.clone().requires_grad_()
        value, stats = Objective(loss, normalize=normalize, chunk_bytes=9000, **guard)(leaf, **batch(case))
        value.backward()
        assert leaf.grad is not None
        found.append((value.detach(), leaf.grad, stats["num_terms"]))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)


def test_many_groups_are_counted_without_a_mask() -> None:
    """24 rows are so few that the mask is counted; here it is not, with the same image twice in a class and across two."""
    n = torch.arange(400)
    seen: list[tuple[Tensor, Tensor]] = []

    class Counting(RowLoss):
        def forward(self, rows: Rows) -> Terms:
            assert rows._related.num_negatives(400) is not None
            seen.append((rows.num_negatives, rows.negative.sum(1)))
            return Terms(rows.dense().sum(), rows.num_negatives.sum())

    uid = n.clone()
    uid[[5, 6]], uid[[80, 200]], uid[[300, 301, 302]] = 5, 80, 300
    Objective(Counting())(torch.randn(400, 4), n // 4, uid=uid, valid=(n % 11 != 0).long())
    for counted, summed in seen:
        assert torch.equal(counted, summed)
    assert len({int(number) for number in seen[0][0]}) > 2


@pytest.mark.parametrize("kind", KINDS)
def test_distances_have_the_gradient_of_torch(kind: Distance) -> None:
    a, b = (torch.randn(n, 5, dtype=torch.float64, requires_grad=True) for n in (4, 7))

    def ours(a: Tensor, b: Tensor) -> Tensor:
        return distances(a @ b.T, (a * a).sum(1)[:, None], (b * b).sum(1)[None, :], kind)

    difference = a[:, None] - b[None]
    theirs = {"cosine": 1 - a @ b.T, "squared_euclidean": difference.square().sum(2), "euclidean": difference.norm(dim=2)}
    torch.testing.assert_close(ours(a, b), theirs[kind])
    assert torch.autograd.gradcheck(ours, (a, b))


@pytest.mark.parametrize("kind", KINDS[1:])
def test_distances_of_equal_and_of_barred_vectors_are_finite_in_gradient(kind: Distance) -> None:
    s = torch.tensor([[1.0, -torch.inf, 0.5]], requires_grad=True)
    one = torch.ones(1, 1)
    F.relu(2 - distances(s, one, one, kind)).sum().backward()
    assert s.grad is not None
    assert s.grad.isfinite().all()
    assert float(s.grad[0, 1]) == 0.0
    assert float(s.grad[0, 2]) > 0.0
