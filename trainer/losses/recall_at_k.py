"""A smooth stand-in for recall@k over the whole global batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from trainer import mining
from trainer.rows import RowLoss, Rows, Terms

Ranks = Sequence[Annotated[int, Field(ge=1, le=2**31)]]
NOTHING = -50.0  # sigmoids below are 0: denormal numbers would slow down the matrix products threefold
KEPT = 3  # sigmoids of a row against all candidates that are not computed twice


class RecallAtK(RowLoss):
    """1 - recall@k with both steps made smooth, mean over `k` and over queries that have a positive.

        rank(q, x) = 1 + sum_{z != x} sigmoid((s_qz - s_qx) / anneal)        over positives and negatives z of q
        recall@k   = min(k, sum_x sigmoid((k - rank(q, x)) / temperature)) / min(k, number of positives x)

    It grows exact with the batch: thousands of candidates, `micro_batch` to fit them. Source: Patel et al. 2022, eq. 5 to
    8, with the two minima of the authors' code.
    """

    temporaries = 4 + KEPT

    def __init__(
        self,
        k: Ranks = (1, 2, 4, 8, 16),
        anneal: float = 0.01,
        temperature: float = 1.0,
    ) -> None:
        super().__init__()
        for name, value in (("anneal", anneal), ("temperature", temperature), ("k", min(k, default=0))):
            if not value > 0:
                raise ValueError(f"loss.{name}: must be above 0, got {list(k) if name == 'k' else value}")
        self.k, self.anneal, self.temperature = list(k), anneal, temperature

    @torch.no_grad()
    def forward(self, rows: Rows) -> Terms:
        mining.pack_(rows)
        positive = rows.is_positive
        near = rows.similarity.gather(1, rows.positives)  # [q, P]
        seen = rows.bar_(rows.similarity, -torch.inf)  # negatives alone, then the positives back
        seen.scatter_reduce_(1, rows.positives, near.masked_fill(~positive, -torch.inf), "amax")
        seen.mul_(1 / self.anneal)
        at = near * (1 / self.anneal)
        rank = torch.empty_like(near)
        steps: list[Tensor] = []  # of the first few positives, to be used again
        for j in range(near.shape[1]):
            step = _step(seen, at[:, j : j + 1])
            rank[:, j] = step.sum(1) + 0.5  # x itself adds 1/2 to the sum
            if j < KEPT:
                steps.append(step)
        recall, by_rank = self._recall(rank, positive)
        has = positive.any(1)
        gradient, by_near = torch.zeros_like(seen), torch.zeros_like(near)
        for j in range(near.shape[1]):
            step = steps[j] if j < KEPT else _step(seen, at[:, j : j + 1])
            steep = step.addcmul_(step, step, value=-1).mul_(-by_rank[:, j : j + 1] / self.anneal)
            by_near[:, j] = -steep.sum(1)
            gradient += steep
        gradient.scatter_add_(1, rows.positives, by_near)
        return Terms((has.to(recall) - recall).double().sum(), has.sum(), gradient=gradient)

    def _recall(self, rank: Tensor, positive: Tensor) -> tuple[Tensor, Tensor]:
        """Mean recall over `k` [q], and its gradient by rank [q, P]."""
        recall, by_rank = torch.zeros_like(rank[:, 0]), torch.zeros_like(rank)
        num_positives = positive.sum(1).clamp_min(1).to(rank)
        for k in self.k:
            hit = ((k - rank) / self.temperature).sigmoid() * positive  # [q, P]
            hits, best = hit.sum(1), num_positives.clamp_max(k) * len(self.k)
            recall += hits.clamp_max(k) / best
            by_rank -= hit * (1 - hit) * ((hits < k) / best)[:, None] / self.temperature
        return recall, by_rank


def _step(seen: Tensor, at: Tensor) -> Tensor:
    """sigmoid(seen - at), [q, G] against [q, 1]."""
    return torch.threshold_(seen - at, NOTHING, -torch.inf).sigmoid_()
