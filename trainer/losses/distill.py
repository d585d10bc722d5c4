"""Distillation of a teacher's vectors: their similarities over the global batch, or the vectors themselves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from trainer import collectives
from trainer.family import Family, Found, Joined, Stats
from trainer.losses.elementwise import mean
from trainer.losses.regress import Regress, needed_target
from trainer.losses.softmax import exp_rows_
from trainer.objective import unit


def distill(kind: Literal["similarity", "neighbours", "vector"] = "similarity", temperature: float = 0.1) -> Family:
    """The loss that brings vectors [n, D] near a teacher's `target` [n, E]; E need not be D, but for `vector`.

    `similarity`: see Similarities; `neighbours`: see Neighbours, the only one with a `temperature`; `vector`: 1 - cosine.
    """
    if not temperature > 0:
        raise ValueError(f"loss.temperature: must be above 0, got {temperature}")
    if kind == "vector":
        return Regress("cosine")
    return Similarities() if kind == "similarity" else Neighbours(temperature)


class Similarities(Family):
    """(s_ij - t_ij)^2, s of the student and t the teacher's cosine, over ordered pairs of different valid rows.

    Rows of this rank against those of all ranks, in chunks, so that no [G, G] is held. Source: Tung & Mori 2019, and
    Park et al. 2019 (relational distillation), on plain cosines.
    """

    def compute(self, x: Tensor, batch: Joined, parameters: Sequence[Tensor]) -> Found:
        teacher = unit(needed_target(x, batch, "distill"))
        everyone, teachers = (collectives.gather(t, batch.num_rows) for t in (x, teacher))  # [G, D], [G, E]
        valid = collectives.gather(batch.ids.valid, batch.num_rows) == 1
        per_row = self.terms_per_row(valid.sum().double())
        count = per_row * valid.sum()
        first = sum(batch.num_rows[: collectives.rank()])
        grad_rows, grad_everyone = torch.zeros_like(x), torch.zeros_like(everyone)
        total, apart = x.new_zeros((), dtype=torch.float64), x.new_zeros((), dtype=torch.float64)
        own = (batch.ids.valid == 1).nonzero()[:, 0]
        per_chunk = max(1, batch.chunk_bytes // max(1, 5 * len(everyone) * x.element_size()))
        for part in torch.split(own, per_chunk):
            s, t = x[part] @ everyone.T, teacher[part] @ teachers.T  # [q, G]
            out = ~valid[None, :].repeat(len(part), 1)
            out[torch.arange(len(part), device=x.device), part + first] = True
            if batch.with_stats:
                apart += (s - t).abs().masked_fill(out, 0).sum().double()
            value, slope = self.pairs(s, t, out)
            total += value.double()
            grad_rows.index_add_(0, part, slope @ everyone)
            grad_everyone.addmm_(slope.T, x[part])
        grad = grad_rows + collectives.scatter_sum(grad_everyone, batch.num_rows)
        grad *= (collectives.world() / count.clamp_min(1)).to(grad.dtype)  # DDP averages over ranks
        others = valid.sum().double() - 1
        stats: Stats = {"similarity_error": torch.stack([apart, len(own) * others])} if batch.with_stats else {}
        value, _, means = mean(total, len(own) * per_row, stats)
        return Found(value.to(x.dtype), grad, (), {**means, "num_terms": count})

    def terms_per_row(self, num_valid: Tensor) -> Tensor:
        """Terms of a valid row in a global batch with so many."""
        return num_valid - 1

    def pairs(self, s: Tensor, t: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
        """Sum of the terms of a chunk, and its gradient by s; `out` [q, G] are no pairs. May overwrite s and t."""
        error = s.sub_(t).masked_fill_(out, 0)
        return error.square().sum(), error * 2


class Neighbours(Similarities):
    """Cross entropy of the teacher's softmax over all other rows and the student's, less its own entropy (KL), per row.

    Both softmaxes are of cosine / temperature. Source: Fang et al. 2021 (SEED), eq. 4, with the global batch as the queue.
    """

    def __init__(self, temperature: float) -> None:
        super().__init__()
        self.temperature = temperature

    def terms_per_row(self, num_valid: Tensor) -> Tensor:
        return (num_valid > 1).double()

    def pairs(self, s: Tensor, t: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
        s = s.div_(self.temperature).masked_fill_(out, -torch.inf)
        t = t.div_(self.temperature).masked_fill_(out, -torch.inf)
        gap = (t - s).masked_fill_(out, 0)  # [q, G]
        p, sum_s = exp_rows_(s)
        q, sum_t = exp_rows_(t)
        sums = (sum_s - sum_t).masked_fill(out.all(1), 0)  # a row without others has no term
        total = (q * gap).sum() + sums.sum()
        return total, (p - q) / self.temperature
