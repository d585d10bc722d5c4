"""What the softmax losses share: the scale of the logits, masked log-sum-exp, and its gradient."""

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
        self.fixed = 1 / temperature
        self.log_scale = nn.Parameter(torch.tensor(-math.log(temperature))) if learnable else None

    def value(self) -> float:
        """The scale of this step. With a learned one it waits for the device."""
        return self.fixed if self.log_scale is None else min(float(self.log_scale.detach().exp()), MAX_SCALE)

    def gradients(self, by_scale: Tensor) -> list[Tensor]:
        """Gradients of the parameters from that of the scale, a scalar: none, or that of log_scale."""
        if self.log_scale is None:
            return []
        scale = self.log_scale.detach().double().exp()
        return [torch.where(scale <= MAX_SCALE, by_scale * scale, torch.zeros_like(scale))]


def exp_rows_(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Overwrite [q, G] logits by exp(logit - log-sum-exp), the softmax; returns it and the log-sum-exp [q].

    Columns at -inf get 0; a row of nothing but -inf gets 0 and -inf.
    """
    highest = logits.amax(1, keepdim=True)
    highest = highest.where(highest > -torch.inf, torch.zeros_like(highest))
    sums = logits.sub_(highest).exp_().sum(1, keepdim=True)
    logits.mul_(torch.where(sums > 0, 1 / sums, torch.zeros_like(sums)))
    return logits, (sums.log() + highest)[:, 0]
