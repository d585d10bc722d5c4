"""Circle loss: similarities pulled to and pushed from their optimum, the farther the harder."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from trainer.losses.softmax import exp_rows_
from trainer.rows import RowLoss, Rows, Terms, fraction


class Circle(RowLoss):
    """log(1 + sum_n exp(g a_n (s_an - m)) sum_p exp(-g a_p (s_ap - 1 + m))), with a_n = max(0, s_an + m).

    m is `margin`, g is `scale`, a_p = max(0, 1 + m - s_ap); no gradient flows through the weights a. One term per anchor
    that has a positive and a negative. Source: Sun et al. 2020, eq. 6 and 8.
    """

    temporaries = 4

    def __init__(self, margin: float = 0.25, scale: float = 256.0) -> None:
        super().__init__()
        self.margin, self.scale = margin, scale

    @torch.no_grad()
    def forward(self, rows: Rows) -> Terms:
        m, g = self.margin, self.scale
        near = rows.similarity.gather(1, rows.positives)  # [q, P]
        weight = (rows.similarity + m).clamp_(min=0).mul_(g)  # [q, G]
        softmax, far = exp_rows_(rows.bar_(rows.similarity.sub_(m).mul_(weight), -torch.inf))
        pull_weight = (1 + m - near).clamp(min=0) * g
        pull = (-pull_weight * (near - 1 + m)).masked_fill(~rows.is_positive, -torch.inf)
        share, close = exp_rows_(pull)
        both = (far > -torch.inf) & (close > -torch.inf)
        zero = far.new_zeros(())
        gap = torch.where(both, far, zero) + torch.where(both, close, zero)
        terms = torch.where(both, F.softplus(gap), zero)
        slope = torch.where(both, gap.sigmoid(), zero)[:, None]
        gradient = softmax.mul_(weight).mul_(slope).scatter_add_(1, rows.positives, -share * pull_weight * slope)
        stats = {"active_fraction": fraction(gap > 0, both)}
        return Terms(terms.double().sum(), both.sum(), stats, gradient)
