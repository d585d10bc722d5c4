"""InfoNCE: pick each positive out of the negatives of the whole global batch."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from trainer.losses.softmax import Scale, exp_rows_
from trainer.rows import RowLoss, Rows, Terms


class InfoNCE(RowLoss):
    """-log( exp(s_ap / t) / (exp(s_ap / t) + sum_n exp(s_an / t)) ), one term per (anchor, positive).

    The anchor's other positives leave the denominator; explicit negatives are candidates of anchors only.
    `learnable`: the temperature is a parameter; `symmetric`: with `queries: anchors`, also from positives to anchors;
    `decoupled`: the positive leaves the denominator (Yeh et al. 2022).
    Source: van den Oord et al. 2018, eq. 4; CLIP is `queries: anchors`, `candidates: other_view`, `symmetric: true`.
    """

    explicit_for_anchors = True
    temporaries = 2

    def __init__(
        self, temperature: float = 0.07, learnable: bool = False, symmetric: bool = False, decoupled: bool = False
    ) -> None:
        super().__init__()
        self.scale = Scale(temperature, learnable)
        self.symmetric = symmetric
        self.decoupled = decoupled

    @torch.no_grad()
    def forward(self, rows: Rows) -> Terms:
        # With L = log sum_n exp(l_an) a term is softplus(L - l_ap): slope sigmoid(L - l_ap) by L, minus that by l_ap.
        scale, positive = self.scale.value(), rows.is_positive
        near = rows.similarity.gather(1, rows.positives) * scale  # [q, P]
        learned = self.scale.log_scale is not None
        similarity = rows.similarity.clone() if learned else rows.similarity
        softmax, far = exp_rows_(rows.bar_(rows.similarity.mul_(scale), -torch.inf))  # [q, G], [q]
        gap = (far[:, None] - near).masked_fill(~positive | (far == -torch.inf)[:, None], -torch.inf)  # [q, P]
        slope = (gap > -torch.inf).to(gap.dtype) if self.decoupled else gap.sigmoid()
        terms = gap.where(gap > -torch.inf, gap.new_zeros(())) if self.decoupled else F.softplus(gap)
        pull = slope.sum(1, keepdim=True)  # [q, 1]
        by_scale = (
            (softmax * similarity).sum(1).dot(pull[:, 0]) - (slope * near).sum() / scale if learned else pull.new_zeros(())
        )
        gradient = softmax.mul_(pull * scale).scatter_add_(1, rows.positives, -slope * scale)
        return Terms(
            terms.double().sum(), positive.sum(), gradient=gradient, parameter_gradients=self.scale.gradients(by_scale)
        )
