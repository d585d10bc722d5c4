"""Contrastive loss over the positive and negative pairs of the whole global batch."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from trainer import mining
from trainer.distance import Distance
from trainer.ids import Ids
from trainer.losses.given import GivenContrastive
from trainer.losses.known import known, through_distance_
from trainer.random_keys import hashed, mix, unit_interval
from trainer.rows import RowLoss, Rows, Terms


class Contrastive(RowLoss):
    """d^power for positive pairs and max(0, margin - d)^power for negative pairs, each unordered pair once, mean over them.

    `half` multiplies by 1/2, `legacy` (power 2) makes the second part max(0, margin - d^2), `weight` is that of positive and
    of negative pairs. `balance` keeps as many negative pairs as there are positive ones on all ranks together: the closest
    (`hardest`; pairs as close as the last one stay too) or any (`sample`). When the caller says which pairs match, the loss
    is GivenContrastive. Source: Hadsell et al. 2006, eq. 4; on raw vectors, with margin 1, the online loss of siamese-triplet.
    """

    temporaries = 6

    def __init__(
        self,
        margin: float = 1.0,
        distance: Distance = "euclidean",
        power: Literal[1, 2] = 2,
        half: bool = False,
        legacy: bool = False,
        weight: tuple[float, float] = (1.0, 1.0),
        balance: Literal["none", "sample", "hardest"] = "none",
    ) -> None:
        super().__init__()
        # Past nn.Module.__setattr__, whose entry the class attribute would hide.
        object.__setattr__(self, "given", GivenContrastive(margin, distance, power, half, legacy, weight))
        self.margin, self.power, self.legacy, self.balance = margin, power, legacy, balance
        self.weight = [w * (0.5 if half else 1.0) for w in weight]
        self.distance: Distance = distance
        self.surveys = balance != "none"
        if balance == "sample":
            self.temporaries = 12  # of integers twice as wide
        self._threshold = torch.inf  # of what `_rank` gives, for this step
        self._cut = torch.inf  # the same while surveying: no more than an upper bound
        self._bound: tuple[Ids | None, int] = (None, 0)

    def forward(self, rows: Rows) -> Terms:
        # Where each pair is met from both sides, all of them at half weight are cheaper than finding out which to count.
        twice = rows.mutual and not self.surveys
        share = 0.5 if twice else 1.0
        positive = rows.is_positive if twice else rows.is_positive & mining.counted_here(rows, rows.positives)
        d_ap = rows.distance_at(rows.positives, self.distance)  # [q, P]
        near = d_ap.where(positive, d_ap.new_zeros(())).pow(self.power).sum() * (share * self.weight[0])
        with torch.no_grad():
            far = mining.distances(rows, self.distance) if twice else self._negatives(rows)
            if self.surveys:
                far.masked_fill_(self._rank(rows, far) > self._threshold, torch.inf)
            num_kept = (rows.num_negatives if twice else mining.num_finite(far)).double().sum()
            total, slope = self._push(far, share * self.weight[1])
            stats = {}
            if rows.with_stats:
                stats["active_fraction"] = torch.stack([slope.sign().sum(1).double().sum().abs(), num_kept])
            gradients = through_distance_(rows, self.distance, slope, far)
        return Terms(near + known(total, gradients), (positive.sum() + num_kept) * share, stats)

    def survey(self, rows: Rows) -> Tensor:
        """Pairs of numbers: (1, number of positive pairs), then (0, rank) of each negative pair that may be kept.  [2 + 2 m]"""
        if rows.candidates is not self._bound[0]:  # all of a group's pairs: an upper bound of the positive ones
            group = rows.candidates.group.sort().values
            size = torch.searchsorted(group, group, right=True) - torch.searchsorted(group, group)  # of each row's group
            self._bound = rows.candidates, self._bound[1] + max(1, int((size - 1).sum()) // 2)
        positive = rows.is_positive & mining.counted_here(rows, rows.positives)
        rank = self._rank(rows, self._negatives(rows))
        found = rank[rank <= min(self._cut, torch.finfo(rank.dtype).max)]
        ranks = torch.stack([torch.zeros_like(found), found], 1).flatten()
        return torch.cat([torch.stack([found.new_ones(()), positive.sum().to(found.dtype)]), ranks])

    def thin(self, found: Tensor) -> Tensor:
        pairs = found.view(-1, 2)
        negative = pairs[pairs[:, 0] == 0, 1]
        if len(negative) <= self._bound[1]:
            return found
        self._cut = _smallest(negative, self._bound[1])
        return pairs[(pairs[:, 0] == 1) | (pairs[:, 1] <= self._cut)].flatten()

    def settle(self, found: Tensor) -> None:
        pairs = found.view(-1, 2).double()
        num_positives = int((pairs[:, 0] * pairs[:, 1]).sum())
        negative = pairs[pairs[:, 0] == 0, 1]
        self._threshold = torch.inf if num_positives else -torch.inf
        if 0 < num_positives <= len(negative):  # more may have been thinned out
            self._threshold = _smallest(negative, num_positives)
        self._cut, self._bound = torch.inf, (None, 0)

    def _negatives(self, rows: Rows) -> Tensor:
        """Distances to negatives whose pair counts here, inf elsewhere.  [q, G]"""
        return mining.bar_elsewhere_(rows, mining.distances(rows, self.distance))

    def _rank(self, rows: Rows, far: Tensor) -> Tensor:
        """The lower the sooner a negative pair is kept; inf where there is none.  [q, G]"""
        if self.balance == "hardest":
            return far
        q, c = (hashed(rows.seed, ids.uid, ids.view) for ids in (rows.queries, rows.candidates))
        chance = unit_interval(mix(q[:, None] + c[None, :])).to(far.dtype)  # a sum: the pair has no order
        return chance.add_(torch.threshold(far, torch.finfo(far.dtype).max, 0.0))

    def _push(self, far: Tensor, weight: float) -> tuple[Tensor, Tensor]:
        """Sum of the negative pairs' terms (float64), and its gradient by distance [q, G]."""
        if self.legacy:
            gap = (self.margin - far * far).clamp_(min=0)
            slope = gap.sign().mul_(far.clamp(max=max(self.margin, 0) ** 0.5)).mul_(-2)
        else:
            gap = (self.margin - far).clamp_(min=0)
            slope = gap.sign().neg_() if self.power == 1 else gap.mul(-2)
            gap = gap if self.power == 1 else gap.square_()
        return gap.sum(1).double().sum() * weight, slope.mul_(weight)


def _smallest(x: Tensor, k: int) -> float:
    """The k-th smallest of the numbers x."""
    if x.device.type == "cpu":
        return float(x.kthvalue(k).values)
    return float(x.topk(k, largest=False, sorted=False).values.max())  # kthvalue is no deterministic kernel there
