"""What the softmax losses share: the scale of the logits and masked log-sum-exp."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

MAX_SCALE = 100.0  # CLIP's clamp: keeps a learned temperature from collapsing


class Scale(nn.Module):
    """1 / temperature, fixed or learned on a log scale (Radford et al. 2021, section 2.5)."""

    def __init__(self, temperature: float, learnable: bool) -> None:
        super().__init__()
        if not temperature > 0:
            raise ValueError(f"loss.temperature: must be above 0, got {temperature}")
        log_scale = torch.tensor(-math.log(temperature), dtype=torch.float64 if not learnable else torch.float32)
        self.log_scale: Tensor
        if learnable:
            self.log_scale = nn.Parameter(log_scale)
        else:
            self.register_buffer("log_scale", log_scale, persistent=False)
        self.learnable = learnable

    def forward(self, similarity: Tensor) -> Tensor:
        if not self.learnable:
            return similarity * float(self.log_scale.exp())
        return similarity * self.log_scale.exp().clamp_max(MAX_SCALE).to(similarity.dtype)


def masked_logsumexp(logits: Tensor, mask: Tensor) -> Tensor:
    """log sum exp over each row of [q, G] where `mask`; hugely negative but finite, with gradient 0, where there is none."""
    return logits.masked_fill(~mask, torch.finfo(logits.dtype).min / 2).logsumexp(1)
