"""Supervised contrastive loss: all positives of an anchor against everything else in the global batch."""

from __future__ import annotations

import torch

from trainer.losses.softmax import Scale, exp_rows_
from trainer.rows import RowLoss, Rows, Terms


class SupCon(RowLoss):
    """Mean over an anchor's positives of -log( exp(s_ap / t) / sum_{positives and negatives} exp(s / t) ).

    One term per anchor that has a positive. Source: Khosla et al. 2020, eq. 2 (L_out). With `data.views: 2` and
    every image its own group this is NT-Xent (SimCLR).
    """

    temporaries = 2

    def __init__(self, temperature: float = 0.1, learnable: bool = False) -> None:
        super().__init__()
        self.scale = Scale(temperature, learnable)

    @torch.no_grad()
    def forward(self, rows: Rows) -> Terms:
        scale, positive = self.scale.value(), rows.is_positive
        learned = self.scale.log_scale is not None
        similarity = rows.similarity.clone() if learned else rows.similarity
        near = rows.similarity.gather(1, rows.positives) * scale  # [q, P]
        logits = rows.bar_(rows.similarity.mul_(scale), -torch.inf)  # negatives alone, then the positives back
        logits.scatter_reduce_(1, rows.positives, near.masked_fill(~positive, -torch.inf), "amax")
        softmax, everyone = exp_rows_(logits)  # [q, G], [q]
        share = positive.to(near.dtype) / positive.sum(1, keepdim=True).clamp_min(
            1
        )  # [q, P] sums to 1, or to 0 without positives
        has = positive.any(1)
        terms = torch.where(has, everyone - (near * share).sum(1), everyone.new_zeros(()))
        weight = has.to(near.dtype)
        by_scale = near.new_zeros(())
        if learned:
            by_scale = (softmax * similarity).sum(1).dot(weight) - (share * near).sum() / scale
        gradient = softmax.mul_((weight * scale)[:, None]).scatter_add_(1, rows.positives, -share * scale)
        return Terms(terms.double().sum(), has.sum(), gradient=gradient, parameter_gradients=self.scale.gradients(by_scale))
