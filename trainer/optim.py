"""Optimizers, the learning-rate schedule and averaged weights."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Sequence

import torch
from torch import nn

from configs.registry import build
from configs.schema import Optim, Part


def build_optimizer(optim: Optim, modules: Iterable[nn.Module]) -> torch.optim.Optimizer:
    """The optimizer over all trainable parameters of `modules`; each parameter once.

    Weight decay is for matrices and kernels only: no biases, norms, temperatures (fewer than 2 dimensions).
    """
    parameters = list(dict.fromkeys(p for module in modules for p in module.parameters() if p.requires_grad))
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": optim.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer: torch.optim.Optimizer = build("optim", Part(name=optim.name), groups=groups, optim=optim)
    return optimizer


def adamw(groups: Sequence[dict[str, object]], optim: Optim) -> torch.optim.Optimizer:
    """AdamW (Loshchilov and Hutter 2019)."""
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=optim.lr, betas=optim.betas, fused=True)


def learning_rate(optim: Optim, step: int, steps: int) -> float:
    """The rate of optimizer step `step` in 1..steps: linear warm-up, then the schedule down to `final_lr * lr`."""
    if step <= optim.warmup_steps:
        return optim.lr * step / optim.warmup_steps
    done = (step - 1 - optim.warmup_steps) / max(1, steps - optim.warmup_steps)
    share = {"cosine": 0.5 * (1 + math.cos(math.pi * done)), "linear": 1 - done, "constant": 1.0}[optim.schedule]
    return optim.lr * (optim.final_lr + (1 - optim.final_lr) * share)


class Average:
    """Exponential moving average of a module's weights; `decay` 0 means the module itself."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.source = module
        self.module = module if decay == 0 else copy.deepcopy(module).requires_grad_(False)

    @torch.no_grad()
    def update(self, step: int) -> None:
        """After optimizer step `step` (from 1): early averages forget faster, so that the start does not linger."""
        if self.decay == 0:
            return
        decay = min(self.decay, step / (step + 9))
        averaged, current = self.module.state_dict().values(), self.source.state_dict().values()
        for held, new in zip(averaged, current, strict=True):
            if held.is_floating_point():
                held.lerp_(new, 1 - decay)
            else:
                held.copy_(new)
