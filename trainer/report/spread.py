"""How near images of one thing and of different things are: histograms of cosines."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

BINS = 2000  # between -1 and 1; drawn in fewer
QUERIES = 2000  # rows of a larger set that are compared with all


@dataclass(frozen=True, slots=True)
class Spread:
    """Counts [BINS] of the cosines of pairs of one group and of pairs of two, in float64."""

    positive: Tensor
    negative: Tensor

    @property
    def nearer(self) -> float | None:
        """How often a random positive pair has a higher cosine than a random negative one; ties count half (the ROC-AUC)."""
        positive, negative = float(self.positive.sum()), float(self.negative.sum())
        if not positive or not negative:
            return None
        below = self.negative.cumsum(0) - self.negative / 2
        return float((self.positive * below).sum()) / (positive * negative)

    @property
    def least(self) -> float:
        """To the tenth below, where all but a thousandth of either kind begins."""
        shares = [counts.cumsum(0) / counts.sum().clamp(min=1) for counts in (self.positive, self.negative)]
        return min(-1 + 0.1 * int((share < 0.001).sum() / (BINS / 20)) for share in shares)


def spread(vectors: Tensor, group: Tensor, *, chunk: int = 512) -> Spread:
    """Of unit vectors [N, D] with groups [N]; of more than QUERIES rows, as many drawn by a fixed seed against all."""
    size = len(group)
    rows = torch.randperm(size, generator=torch.Generator().manual_seed(0))[:QUERIES]
    positive, negative = torch.zeros(BINS, dtype=torch.float64), torch.zeros(BINS, dtype=torch.float64)
    for part in torch.split(rows, chunk):
        places = ((vectors[part] @ vectors.T + 1) * (BINS / 2)).long().clamp_(0, BINS - 1)  # [c, N]
        same = group[part][:, None] == group[None, :]
        negative += torch.bincount(places[~same], minlength=BINS)
        same.scatter_(1, part[:, None], False)
        positive += torch.bincount(places[same], minlength=BINS)
    return Spread(positive, negative)
