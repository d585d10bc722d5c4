"""Triplet loss with triplets mined from the whole global batch."""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from trainer import mining
from trainer.rows import Distance, RowLoss, Rows, Terms, fraction


class Triplet(RowLoss):
    """max(0, d_ap - d_an + margin), or softplus(d_ap - d_an) with `soft`.

    `miner: batch_hard`: for each anchor its farthest positive and closest negative; one term per anchor that has both
    (Hermans et al. 2017, eq. 5). `miner: semi_hard`: for each (anchor, positive) the closest negative that is farther
    than the positive, else the farthest; one term per such pair (Schroff et al. 2015, as TensorFlow computes it).
    """

    temporaries = 4

    def __init__(
        self,
        miner: Literal["batch_hard", "semi_hard"] = "batch_hard",
        margin: float = 0.2,
        distance: Distance = "euclidean",
        soft: bool = False,
    ) -> None:
        super().__init__()
        self.miner = miner
        self.margin = margin
        self.distance: Distance = distance
        self.soft = soft

    def forward(self, rows: Rows) -> Terms:
        if self.miner == "batch_hard":
            positives, has_positive = mining.hardest_positive(rows, self.distance)  # [q, 1]
            negatives, has_negative = mining.hardest_negative(rows, self.distance)
            exists = has_positive & has_negative
        else:
            positives = rows.positives  # [q, P]
            negatives, exists = mining.semi_hard(rows, self.distance)
        d_ap, d_an = rows.distance_at(positives, self.distance), rows.distance_at(negatives, self.distance)
        return self._terms(d_ap, d_an, exists)

    def _terms(self, d_ap: Tensor, d_an: Tensor, exists: Tensor) -> Terms:
        zero = d_ap.new_zeros(())
        gap = d_ap.where(exists, zero) - d_an.where(exists, zero)  # cut before any arithmetic: the rest may be infinite
        terms = F.softplus(gap) if self.soft else F.relu(gap + self.margin)
        total, count = terms.where(exists, zero).sum(), exists.sum()
        return Terms(total, count, {"active_fraction": fraction(terms.detach() > 0, exists)})
