"""Sigmoid loss: every pair of a query and a candidate on its own, matching or not."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from trainer.rows import RowLoss, Rows, Terms


class Sigmoid(RowLoss):
    """softplus(-z (t s + b)) summed over a query's candidates, z = 1 for positives and -1 for negatives; mean over queries.

    t = exp(log_scale) and b are learned, from t = 10 and b = -10. Source: Zhai et al. 2023 (SigLIP), eq. 1, which is
    `queries: anchors`, `candidates: other_view`.
    """

    temporaries = 4

    def __init__(self, scale: float = 10.0, bias: float = -10.0, learnable: bool = True) -> None:
        super().__init__()
        if not scale > 0:
            raise ValueError(f"loss.scale: must be above 0, got {scale}")
        self.log_scale = nn.Parameter(torch.tensor(math.log(scale)), requires_grad=learnable)
        self.bias = nn.Parameter(torch.tensor(bias), requires_grad=learnable)

    @torch.no_grad()
    def forward(self, rows: Rows) -> Terms:
        scale, bias = self.log_scale.exp().to(rows.similarity), self.bias.to(rows.similarity)
        near = rows.similarity.gather(1, rows.positives)  # [q, P]
        pull = (-scale * near - bias).masked_fill(~rows.is_positive, -torch.inf)
        push = rows.bar_(rows.similarity * scale + bias, -torch.inf)  # [q, G]
        total = F.softplus(push).sum(1).double().sum() + F.softplus(pull).double().sum()
        by_push, by_pull = push.sigmoid_(), pull.sigmoid()
        by_scale = (by_push * rows.similarity).sum(1).double().sum() - (by_pull * near).double().sum()
        by_bias = by_push.sum(1).double().sum() - by_pull.double().sum()
        gradient = by_push.mul_(scale).scatter_add_(1, rows.positives, -by_pull * scale)
        count = torch.tensor(len(near), device=near.device)
        learned = [by_scale * scale, by_bias] if self.bias.requires_grad else []
        return Terms(total, count, gradient=gradient, parameter_gradients=learned)
