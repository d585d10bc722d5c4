"""Choosing which pairs count: columns of a chunk's rows, found without gradient.

Candidates come sorted by uid and the first of equal values along a row is picked, so ties go to the lowest uid.
`nearness` falls as the distance grows (see Rows.nearness).
"""

from __future__ import annotations

import torch
from torch import Tensor

from trainer.rows import Distance, Rows


def hardest_positive(rows: Rows, kind: Distance) -> tuple[Tensor, Tensor]:
    """The farthest positive of each query: columns [q, 1], and whether there is any [q, 1]."""
    nearness = rows.nearness(kind, rows.positives).masked_fill(~rows.is_positive, torch.inf)
    place = nearness.min(1, keepdim=True).indices
    return rows.positives.gather(1, place), rows.is_positive.any(1, keepdim=True)


def hardest_negative(rows: Rows, kind: Distance) -> tuple[Tensor, Tensor]:
    """The closest negative of each query: columns [q, 1], and whether there is any [q, 1]."""
    nearness, columns = negatives(rows, kind).max(1, keepdim=True)
    return columns, nearness > -torch.inf


def negatives(rows: Rows, kind: Distance) -> Tensor:
    """Nearness of the negatives, -inf elsewhere.  [q, G], its own memory"""
    nearness = rows.nearness(kind)
    return rows.bar_(nearness.clone() if nearness is rows.similarity else nearness, -torch.inf)


def semi_hard(rows: Rows, kind: Distance) -> tuple[Tensor, Tensor]:
    """For every (query, positive) the closest negative strictly farther than the positive, else the farthest negative.

    No upper bound. Returns columns and whether the pair and a negative exist, [q, P] each.
    Source: TensorFlow Addons' triplet_semihard_loss.
    """
    nearness = negatives(rows, kind)  # [q, G]
    positive = rows.nearness(kind, rows.positives)  # [q, P]
    farthest, fallback = nearness.masked_fill(nearness == -torch.inf, torch.inf).min(1, keepdim=True)
    columns = torch.empty_like(rows.positives)
    none = nearness.new_full((), -torch.inf)
    for j in range(columns.shape[1]):
        nearest, column = torch.where(nearness < positive[:, j : j + 1], nearness, none).max(1, keepdim=True)
        columns[:, j : j + 1] = torch.where(nearest > -torch.inf, column, fallback)
    return columns, rows.is_positive & (farthest < torch.inf)
