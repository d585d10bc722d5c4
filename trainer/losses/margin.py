"""Margin-based loss with a learned boundary between positive and negative pairs."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer import mining
from trainer.distance import Distance
from trainer.losses.known import known, through_distance_
from trainer.rows import RowLoss, Rows, Terms


class Margin(RowLoss):
    """max(0, d_ap - beta + margin) for positive and max(0, beta - d_an + margin) for negative pairs, mean over those above 0.

    `miner: distance_weighted`: every (anchor, positive) brings its pair and one drawn negative (see trainer/mining.py);
    `all`: every positive and every negative pair. beta is learned unless `learnable` is false.
    Source: Wu et al. 2017, eq. 7, without the regulariser of beta; the mean is that of the authors' code.
    """

    temporaries = 6

    def __init__(
        self,
        miner: Literal["distance_weighted", "all"] = "distance_weighted",
        margin: float = 0.2,
        beta: float = 1.2,
        learnable: bool = True,
        distance: Distance = "euclidean",
    ) -> None:
        super().__init__()
        self.miner, self.margin = miner, margin
        self.distance: Distance = distance
        self.beta: Tensor = torch.tensor(beta)
        if learnable:
            self.beta = nn.Parameter(self.beta)

    def forward(self, rows: Rows) -> Terms:
        d_ap = rows.distance_at(rows.positives, self.distance)  # [q, P]
        beta = self.beta.to(d_ap)
        if self.miner == "all":
            total, num_active, num_all, exists = *self._all_negatives(rows, beta), rows.is_positive
        else:
            with torch.no_grad():
                columns, exists = mining.distance_weighted(rows)
            d_an = rows.distance_at(columns, self.distance)
            far = F.relu(beta - d_an + self.margin).where(exists, d_an.new_zeros(()))
            total, num_active, num_all = far.sum(), (far > 0).sum(), exists.sum()
        near = F.relu(d_ap - beta + self.margin).where(exists, d_ap.new_zeros(()))
        count = num_active + (near > 0).sum()
        return Terms(total + near.sum(), count, {"active_fraction": torch.stack([count, num_all + exists.sum()])})

    def _all_negatives(self, rows: Rows, beta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The sum over every negative pair, how many are active, and how many there are."""
        with torch.no_grad():
            far = mining.distances(rows, self.distance)  # [q, G]
            num_all = mining.num_finite(far).double().sum()
            gap = (beta + self.margin - far).clamp_(min=0)
            total = gap.sum(1).double().sum()
            slope = gap.sign_()
            num_active = slope.sum(1).double().sum()
            gradients = [(beta, num_active.to(beta)), *through_distance_(rows, self.distance, slope.neg_(), far)]
        return known(total, gradients), num_active, num_all
