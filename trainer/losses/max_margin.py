"""Max-margin ranking loss between two views, with all or the hardest of the batch's negatives."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from trainer import mining
from trainer.losses.hinges import all_hinges
from trainer.rows import RowLoss, Rows, Terms, fraction


class MaxMargin(RowLoss):
    """max(0, margin + s_an - s_ap) for each (query, positive), summed over negatives or for the `hardest` one.

    The mean is over records that have a positive. `symmetric`: with `queries: anchors`, also from positives to anchors.
    With `candidates: other_view` `sum` is VSE (Kiros et al. 2014; Karpathy & Fei-Fei 2015) and `hardest` VSE++ (Faghri et
    al. 2018, eq. 6).
    """

    temporaries = 5

    def __init__(self, margin: float = 0.2, over: Literal["sum", "hardest"] = "hardest", symmetric: bool = True) -> None:
        super().__init__()
        self.margin, self.over, self.symmetric = margin, over, symmetric

    def forward(self, rows: Rows) -> Terms:
        return self._hardest(rows) if self.over == "hardest" else self._sum(rows)

    def _hardest(self, rows: Rows) -> Terms:
        with torch.no_grad():
            columns, has_negative = mining.hardest_negative(rows, "cosine")  # [q, 1]
        exists = rows.is_positive & has_negative
        zero = rows.similarity.new_zeros(())
        gap = rows.at(columns).where(has_negative, zero) - rows.at(rows.positives).where(exists, zero)
        terms = F.relu(gap + self.margin).where(exists, zero)
        return Terms(terms.sum(), _num_records(rows), {"active_fraction": fraction(terms.detach() > 0, exists)})

    @torch.no_grad()
    def _sum(self, rows: Rows) -> Terms:
        mining.pack_(rows)
        near = rows.similarity.gather(1, rows.positives)  # [q, P]
        far = rows.bar_(rows.similarity.neg(), torch.inf)
        num_negatives = mining.num_finite(far)[:, None]
        total, by_near, by_far = all_hinges((self.margin - near).masked_fill(~rows.is_positive, -torch.inf), far)
        gradient = by_far.neg_().scatter_add_(1, rows.positives, -by_near)
        num_all = (num_negatives * rows.is_positive).sum().double()
        stats = {"active_fraction": torch.stack([by_near.double().sum(), num_all])}
        return Terms(total, _num_records(rows), stats, gradient)


def _num_records(rows: Rows) -> Tensor:
    """Queries with a positive, a record once: at its anchor, or at the row itself where it is alone in its record."""
    same = rows.candidates.record[rows.positives] == rows.queries.record[:, None]
    first = (rows.queries.view == 0) | ~(rows.is_positive & same).any(1)
    return (rows.is_positive.any(1) & first).sum()
