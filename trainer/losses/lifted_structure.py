"""Lifted structured loss: every positive pair against the negatives of both its rows."""

from __future__ import annotations

import torch
from torch import Tensor

from trainer import mining
from trainer.distance import Distance
from trainer.losses.known import known, through_distance_
from trainer.losses.softmax import exp_rows_
from trainer.rows import RowLoss, Rows, Terms, fraction


class LiftedStructure(RowLoss):
    """max(0, J)^2 / 2 over positive pairs, J = d_ij + log(sum_k exp(margin - d_ik) + sum_l exp(margin - d_jl)).

    k and l are the negatives of i and of j, wherever j is: a first pass over the batch finds the logarithm of every row's
    sum. A positive that is no query (`queries: anchors`, memory, `candidates: other_view`) brings no negatives. The mean
    over ordered pairs is that over unordered ones. Source: Oh Song et al. 2016, eq. 4 (the smooth upper bound).
    """

    surveys = True
    temporaries = 4

    def __init__(self, margin: float = 1.0, distance: Distance = "euclidean") -> None:
        super().__init__()
        self.margin = margin
        self.distance: Distance = distance
        self._found = torch.empty(0, 2)

    def survey(self, rows: Rows) -> Tensor:
        """Column and log of the sum over negatives of every query, column after column.  [2 q]"""
        far = mining.distances(rows, self.distance).neg_()
        if rows.candidate_norms.requires_grad or self.distance == "cosine":
            level = exp_rows_(far.add_(self.margin))[1]
        else:  # of unit vectors no distance is above 4: nothing can vanish, so no maximum has to be taken out first
            level = far.exp_().sum(1).log_().add_(self.margin)
        known_as = rows.place >= 0
        return torch.stack([rows.place.to(level.dtype), level], 1)[known_as].flatten()

    def settle(self, found: Tensor) -> None:
        self._found = found.view(-1, 2)

    def forward(self, rows: Rows) -> Terms:
        exists = rows.is_positive
        d_ap = rows.distance_at(rows.positives, self.distance)  # [q, P]
        with torch.no_grad():
            far = mining.distances(rows, self.distance)
            other, twice = self._others(rows, rows.positives)
            if rows.mutual:  # the first pass has found this row's own sum too
                level = self._others(rows, rows.place[:, None])[0]  # [q, 1]
                safe = level.where(level > -torch.inf, level.new_zeros(()))
                softmax, level = torch.sub(self.margin - safe, far, out=rows.similarity).exp_(), level[:, 0]
            else:
                softmax, level = exp_rows_((-far).add_(self.margin))  # [q, G], [q]
            mine = level[:, None].expand_as(other)
            both = torch.logaddexp(mine, other)
            gap = (d_ap + both).masked_fill(~exists, -torch.inf).clamp(min=0)  # [q, P]
            # A pair between queries is met from both sides, and from both the distances of this row's negatives pull.
            share = (mine - both).exp().nan_to_num(0.0) * gap * (1 + twice.to(gap.dtype))
            slope = softmax.mul_(-share.sum(1, keepdim=True))
            total = gap.square().double().sum() / 2
            stats = {"active_fraction": fraction(gap > 0, exists)}
            gradients = [(d_ap, gap), *through_distance_(rows, self.distance, slope, far)]
        return Terms(known(total, gradients), exists.sum(), stats)

    def _others(self, rows: Rows, columns: Tensor) -> tuple[Tensor, Tensor]:
        """The logarithms at `columns` [q, k], -inf for none, and whether the row there is a query.  [q, k] each"""
        table = rows.similarity.new_full((rows.similarity.shape[1],), torch.inf)
        table[self._found[:, 0].long()] = self._found[:, 1].to(table)
        level = table[columns]
        is_query = level < torch.inf
        return level.masked_fill(~is_query, -torch.inf), is_query
