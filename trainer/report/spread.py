"""How near images of one thing and of different things are: histograms of cosines, or of distances."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.euclidean import lifted, minus_distance

BINS = 2000  # between the least and the largest score; drawn in fewer
QUERIES = 2000  # rows of a larger set that are compared with all


@dataclass(frozen=True, slots=True)
class Spread:
    """Counts [BINS] of the cosines of pairs of one group and of pairs of two, in float64.

    `farthest`: of raw vectors, where scores are minus the distance; bins lie between -farthest and 0. 0: cosines, -1 to 1.
    """

    positive: Tensor
    negative: Tensor
    farthest: float = 0.0

    @property
    def bounds(self) -> tuple[float, float]:
        return (-self.farthest, 0.0) if self.farthest else (-1.0, 1.0)

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
        """To the tenth (of raw vectors the twentieth of the range) below, where all but a thousandth of either kind begins."""
        low, high = self.bounds
        shares = [counts.cumsum(0) / counts.sum().clamp(min=1) for counts in (self.positive, self.negative)]
        return min(low + (high - low) / 20 * int((share < 0.001).sum() / (BINS / 20)) for share in shares)


def spread(vectors: Tensor, group: Tensor, *, chunk: int = 512, raw: bool = False) -> Spread:
    """Of vectors [N, D] with groups [N], by cosine or, where they are raw, by distance; of more than QUERIES rows, as many
    drawn by a fixed seed against all.
    """
    size = len(group)
    rows = torch.randperm(size, generator=torch.Generator().manual_seed(0))[:QUERIES]
    positive, negative = torch.zeros(BINS, dtype=torch.float64), torch.zeros(BINS, dtype=torch.float64)
    left, right = lifted(vectors, vectors) if raw else (vectors, vectors)
    farthest = float((vectors.max(0).values - vectors.min(0).values).double().norm().clamp(min=1e-12)) if raw else 0.0
    for part in torch.split(rows, chunk):
        scores = left[part] @ right.T  # [c, N]
        places = 1 + minus_distance(scores) / farthest if raw else (scores + 1) / 2
        places = (places * BINS).long().clamp_(0, BINS - 1)
        same = group[part][:, None] == group[None, :]
        negative += torch.bincount(places[~same], minlength=BINS)
        same.scatter_(1, part[:, None], False)
        positive += torch.bincount(places[same], minlength=BINS)
    return Spread(positive, negative, farthest)
