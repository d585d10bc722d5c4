"""Choosing which negatives count: row-wise picks from distances [q, G] and boolean masks.

Candidates come sorted by uid and torch picks the first of equal values along a row, so ties go to the lowest uid.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def farthest(distance: Tensor, mask: Tensor) -> Tensor:
    """The largest distance of each row where `mask`, [q]; -inf where there is none."""
    return distance.masked_fill(~mask, -math.inf).max(1).values


def closest(distance: Tensor, mask: Tensor) -> Tensor:
    """The smallest distance of each row where `mask`, [q]; inf where there is none."""
    return distance.masked_fill(~mask, math.inf).min(1).values


def semi_hard(distance: Tensor, positive: Tensor, negative: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """For every (anchor, positive) the closest negative strictly farther than the positive, else the farthest negative.

    No upper bound. Returns (d_ap, d_an, exists), each [q, most positives of a row].
    Source: TensorFlow Addons' triplet_semihard_loss.
    """
    most = int(positive.sum(1).max()) if positive.numel() else 0
    found, columns = positive.to(torch.uint8).topk(most, dim=1)  # [q, P]
    d_ap = distance.gather(1, columns)
    ordered = distance.masked_fill(~negative, math.inf).sort(dim=1, stable=True).values  # [q, G]
    num_negatives = negative.sum(1, keepdim=True)
    first_farther = torch.searchsorted(ordered.detach(), d_ap.detach().contiguous(), right=True)
    some_farther = first_farther < num_negatives
    closest_farther = ordered.gather(1, first_farther.clamp_max(distance.shape[1] - 1))
    d_an = closest_farther.where(some_farther, farthest(distance, negative)[:, None])
    return d_ap, d_an, found.bool() & (num_negatives > 0)
