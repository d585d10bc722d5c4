"""Confidence intervals by the bootstrap: classes are drawn anew, since images of one class stand and fall together."""

from __future__ import annotations

import torch
from torch import Tensor

AT_ONCE = 2**24  # draws in memory


def intervals(values: Tensor, group: Tensor, *, resamples: int = 1000, seed: int = 0, share: float = 0.95) -> Tensor:
    """[M, 2] lower and upper bound of the mean of each of values [M, Q], whose queries belong to the classes group [Q].

    The bounds are percentiles of `resamples` means, each of as many classes as there are, drawn with replacement.
    """
    classes, member = torch.unique(group.cpu(), return_inverse=True)
    sums = torch.zeros((len(classes), len(values) + 1), dtype=torch.float64)
    counted = torch.cat([values.cpu().double(), torch.ones((1, len(member)), dtype=torch.float64)])
    sums.index_add_(0, member, counted.T.contiguous())  # [C, M + 1], the last column counts queries
    generator, found = torch.Generator().manual_seed(seed), []
    for part in torch.split(torch.empty(resamples), max(1, AT_ONCE // len(classes))):
        drawn = torch.randint(len(classes), (len(part), len(classes)), generator=generator)
        times = torch.zeros(drawn.shape, dtype=torch.float64)
        total = times.scatter_add_(1, drawn, torch.ones_like(times)) @ sums
        found.append(total[:, :-1] / total[:, -1:])
    bounds = torch.tensor([(1 - share) / 2, (1 + share) / 2], dtype=torch.float64)
    return torch.quantile(torch.cat(found), bounds, dim=0).T
