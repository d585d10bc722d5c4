"""Triplet loss with triplets mined from the whole global batch."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer import mining
from trainer.rows import Distance, Rows, Terms


class Triplet(nn.Module):
    """max(0, d_ap - d_an + margin), or softplus(d_ap - d_an) with `soft`.

    `miner: batch_hard`: for each anchor its farthest positive and closest negative; one term per anchor that has both
    (Hermans et al. 2017, eq. 5). `miner: semi_hard`: for each (anchor, positive) the closest negative that is farther
    than the positive, else the farthest; one term per such pair (Schroff et al. 2015, as TensorFlow computes it).
    """

    symmetric = False
    temporaries = 8

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
        distance = rows.distance(self.distance)  # [q, G]
        if self.miner == "batch_hard":
            d_ap = mining.farthest(distance, rows.positive)  # [q]
            d_an = mining.closest(distance, rows.negative)
            exists = rows.positive.any(1) & rows.negative.any(1)
        else:
            d_ap, d_an, exists = mining.semi_hard(distance, rows.positive, rows.negative)  # [q, P]
        return self._terms(d_ap, d_an, exists)

    def _terms(self, d_ap: Tensor, d_an: Tensor, exists: Tensor) -> Terms:
        zero = d_ap.new_zeros(())
        gap = d_ap.where(exists, zero) - d_an.where(exists, zero)  # cut before any arithmetic: the rest may be infinite
        terms = F.softplus(gap) if self.soft else F.relu(gap + self.margin)
        total, count = terms.where(exists, zero).sum(), exists.sum()
        active = ((terms.detach() > 0) & exists).sum()
        return Terms(total, count, {"active_fraction": torch.stack([active, count])})
