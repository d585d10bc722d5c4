"""Supervised contrastive loss: all positives of an anchor against everything else in the global batch."""

from __future__ import annotations

from torch import nn

from trainer.losses.softmax import Scale, masked_logsumexp
from trainer.rows import Rows, Terms


class SupCon(nn.Module):
    """Mean over an anchor's positives of -log( exp(s_ap / t) / sum_{positives and negatives} exp(s / t) ).

    One term per anchor that has a positive. Source: Khosla et al. 2020, eq. 2 (L_out). With `data.views: 2` and
    every image its own group this is NT-Xent (SimCLR).
    """

    symmetric = False
    temporaries = 5

    def __init__(self, temperature: float = 0.1, learnable: bool = False) -> None:
        super().__init__()
        self.scale = Scale(temperature, learnable)

    def forward(self, rows: Rows) -> Terms:
        logits = self.scale(rows.similarity)  # [q, G]
        denominator = masked_logsumexp(logits, rows.positive | rows.negative)  # [q]
        num_positives = rows.positive.sum(1)  # [q]
        mean_positive = (logits * rows.positive).sum(1) / num_positives.clamp_min(1)
        has = num_positives > 0
        return Terms(((denominator - mean_positive) * has).where(has, denominator.new_zeros(())).sum(), has.sum())
