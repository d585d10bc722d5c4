"""How well a cosine tells whether two images show the same thing."""

from __future__ import annotations

import torch
from torch import Tensor

BINS = 20_000  # of cosines from -1 to 1
QUERIES = 1024


def match_thresholds(vectors: Tensor, group: Tensor) -> dict[str, float]:
    """Cosines from which two images count as the same: at a false accept rate of 1e-3, and at the best F1; to 1e-4.

    vectors [N, D] of unit length, group [N]. Raises ValueError when there are no pairs of one sort.
    """
    same, different = _histograms(vectors.float(), group)  # [BINS]
    if not same.sum() or not different.sum():
        raise ValueError("telling pairs apart takes pairs of the same thing and pairs of different things")
    true, false = (counts.flip(0).cumsum(0).flip(0) for counts in (same, different))  # accepted from each bin on
    f1 = 2 * true / (true + false + same.sum())
    none = false.new_zeros(1)  # beyond the last bin
    at = {"far_1e-3": int((torch.cat([false, none]) <= 1e-3 * different.sum()).nonzero()[0]), "best_f1": int(f1.argmax())}
    return {name: index * 2 / BINS - 1 for name, index in at.items()}


def _histograms(vectors: Tensor, group: Tensor) -> tuple[Tensor, Tensor]:
    """Counts of the cosines of pairs of the same group and of different ones, float64, every pair once."""
    found = [torch.zeros(BINS, dtype=torch.float64) for _ in range(2)]
    index = torch.arange(len(group), device=group.device)
    for rows in torch.split(index, QUERIES):
        bins = ((vectors[rows] @ vectors.T + 1) * (BINS / 2)).long().clamp(0, BINS - 1)  # [q, N]
        later = rows[:, None] < index
        for counts, chosen in zip(found, (group[rows, None] == group, group[rows, None] != group), strict=True):
            counts += torch.bincount(bins[chosen & later].cpu(), minlength=BINS)
    return found[0], found[1]
