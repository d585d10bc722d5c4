"""InfoNCE: pick each positive out of the negatives of the whole global batch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from trainer.losses.softmax import Scale, masked_logsumexp
from trainer.rows import Rows, Terms


class InfoNCE(nn.Module):
    """-log( exp(s_ap / t) / (exp(s_ap / t) + sum_n exp(s_an / t)) ), one term per (anchor, positive).

    The anchor's other positives leave the denominator; explicit negatives are candidates of anchors only.
    `learnable`: the temperature is a parameter; `symmetric`: with `queries: anchors`, also from positives to anchors;
    `decoupled`: the positive leaves the denominator (Yeh et al. 2022).
    Source: van den Oord et al. 2018, eq. 4; CLIP is `queries: anchors`, `candidates: other_view`, `symmetric: true`.
    """

    explicit_for_anchors = True
    temporaries = 7

    def __init__(
        self, temperature: float = 0.07, learnable: bool = False, symmetric: bool = False, decoupled: bool = False
    ) -> None:
        super().__init__()
        self.scale = Scale(temperature, learnable)
        self.symmetric = symmetric
        self.decoupled = decoupled

    def forward(self, rows: Rows) -> Terms:
        logits = self.scale(rows.similarity)  # [q, G]
        gap = masked_logsumexp(logits, rows.negative)[:, None] - logits
        if self.decoupled:
            terms = gap.where(rows.negative.any(1, keepdim=True), torch.zeros_like(gap))
        else:
            terms = F.softplus(gap)
        return Terms(terms.where(rows.positive, torch.zeros_like(terms)).sum(), rows.positive.sum())
