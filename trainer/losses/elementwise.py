"""The base of losses whose terms need no other rank's rows: nothing is gathered, only sums and counts are reduced."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from trainer import collectives
from trainer.family import Family, Found, Joined, Stats
from trainer.rows import Terms


class Elementwise(Family):
    """Terms over this rank's own rows, differentiated by autograd; the mean is over the terms of all ranks."""

    def terms(self, x: Tensor, batch: Joined) -> Terms:
        """Sum and count over vectors x [n, D], differentiable; no collective. A row that is not valid has no term."""
        raise TypeError(f"{type(self).__name__} computes no terms")

    def compute(self, x: Tensor, batch: Joined, parameters: Sequence[Tensor]) -> Found:
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            found = self.terms(leaf, batch)
            grad = torch.autograd.grad(found.total, leaf, allow_unused=True)[0] if found.total.requires_grad else None
        value, count, stats = mean(found.total, found.count, found.stats if batch.with_stats else {})
        share = collectives.world() / count.clamp_min(1)  # DDP averages over ranks, so the sum is scaled here
        grad = torch.zeros_like(x) if grad is None else grad * share.to(x.dtype)
        return Found(value.to(x.dtype), grad, (), {**stats, "num_terms": count})


def mean(total: Tensor, count: Tensor, stats: Stats) -> tuple[Tensor, Tensor, Stats]:
    """Mean over all ranks (0 without terms), global count, and statistics from pairs (sum, count); float64.

    Statistics named num_* stay sums. Collective: every rank calls it with the same names.
    """
    numbers = torch.stack([total.detach().double(), count.double()])
    summed = collectives.total(torch.cat([numbers, *(pair.double() for pair in stats.values())])).view(-1, 2)
    means = {
        name: pair[0] if name.startswith("num_") else pair[0] / pair[1].clamp_min(1)
        for name, pair in zip(stats, summed[1:], strict=True)
    }
    return summed[0, 0] / summed[0, 1].clamp_min(1), summed[0, 1], means
