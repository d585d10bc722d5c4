"""Proxy-Anchor: each class centre pulls its own samples and pushes all others, the hard ones most."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from configs.section import Dim
from trainer.centres import Centres, Classes, Samples, Shard, Share
from trainer.losses.softmax import exp_rows_


class ProxyAnchor(Centres):
    """Over proxies p of the batch's classes: mean of log(1 + sum_{x of p} exp(-alpha (s - margin))); over all proxies:
    mean of log(1 + sum_{x of others} exp(alpha (s + margin))); s is the cosine of x and p. The loss is their sum.

    Rows of unknown groups are no one's negatives. Source: Kim et al. 2020, eq. 4.
    """

    def __init__(self, num_classes: Classes, dim: Dim, margin: float = 0.1, alpha: float = 32.0, shard: Shard = "auto") -> None:
        super().__init__(num_classes, dim, shard=shard)
        if not alpha > 0:
            raise ValueError(f"loss.alpha: must be above 0, got {alpha}")
        self.margin, self.alpha = margin, alpha

    @torch.no_grad()
    def compare(self, samples: Samples, centres: Tensor, bias: Tensor | None) -> Share:
        x, alpha = samples.x, self.alpha
        present = torch.zeros(self.num_classes, dtype=torch.bool, device=x.device)
        present[samples.label] = True
        num_present = present.sum().clamp_min(1).to(x.dtype)
        grad_x, grad_centres = torch.zeros_like(x), torch.zeros_like(centres)
        total = torch.zeros((), dtype=torch.float64, device=x.device)
        per_chunk = max(1, samples.chunk_bytes // max(1, 4 * len(x) * x.element_size()))
        classes = torch.arange(samples.first, samples.first + samples.num, device=x.device)
        for start in range(0, samples.num if len(x) else 0, per_chunk):
            part = slice(start, start + per_chunk)
            s = centres[part] @ x.T  # [p, N]
            own = samples.label[None, :] == classes[part, None]
            pulls, pull = exp_rows_((-alpha * (s - self.margin)).masked_fill_(~own, -torch.inf))  # [p, N], [p]
            slope = pulls.mul_((-alpha / num_present) * pull.sigmoid()[:, None])
            pushes, push = exp_rows_(s.add_(self.margin).mul_(alpha).masked_fill_(own, -torch.inf))
            slope += pushes.mul_((alpha / self.num_classes) * push.sigmoid()[:, None])
            total += (F.softplus(pull).sum() / num_present + F.softplus(push).sum() / self.num_classes).double()
            grad_x.addmm_(slope.T, centres[part])
            grad_centres[part] = slope @ x
        return Share(total, grad_x, grad_centres)
