"""How hard triplets are: how their negative lies to their positive and the margin (Schroff et al. 2015)."""

from __future__ import annotations

import torch
from torch import Tensor

from trainer import mining
from trainer.distance import Distance
from trainer.rows import Rows

MOST_POSITIVES = 4  # of a query: more would cost two passes over [q, G] each
Stats = dict[str, Tensor]


def kinds(d_ap: Tensor, d_an: Tensor, margin: float) -> Tensor:
    """0 hard: d_an < d_ap. 1 semi-hard: d_ap <= d_an < d_ap + margin. 2 easy: the rest.  Of any one shape, int64."""
    return (d_an >= d_ap).long() + (d_an >= torch.maximum(d_ap, d_ap + margin)).long()


def shares(kind: Tensor, exists: Tensor) -> Stats:
    """Statistics of `kinds` where there is a triplet; together they are 1.  [...] each"""
    return as_stats(*(((kind == number) & exists).sum() for number in range(3)))


@torch.no_grad()
def shares_of_all(rows: Rows, distance: Distance, margin: float) -> Stats:
    """The same of every (query, positive, negative), of the first MOST_POSITIVES positives of a query.

    Overwrites nothing and does not wait for the device.
    """
    order = (~rows.is_positive).byte().argsort(dim=1, stable=True)[:, :MOST_POSITIVES]
    exists = rows.is_positive.gather(1, order)
    near = mining.distances(rows, distance, rows.positives.gather(1, order))  # [q, <= 4]
    far = mining.distances(rows, distance)  # [q, G], inf where there is no negative
    hard, within = far.new_zeros((), dtype=torch.int64), far.new_zeros((), dtype=torch.int64)
    for d_ap, one in zip(torch.split(near, 1, dim=1), torch.split(exists, 1, dim=1), strict=True):
        bound = d_ap.masked_fill(~one, -torch.inf)
        hard += (far < bound).sum()
        within += (far < torch.maximum(bound, bound + margin)).sum()
    every = (rows.num_negatives[:, None] * exists).sum()
    return as_stats(hard, within - hard, every - within)


def as_stats(hard: Tensor, semi_hard: Tensor, easy: Tensor) -> Stats:
    """Counts as statistics (sum, count)."""
    every = hard + semi_hard + easy
    counts = {"hard_fraction": hard, "semi_hard_fraction": semi_hard, "easy_fraction": easy}
    return {name: torch.stack([count, every]) for name, count in counts.items()}
