"""Optimizers by name: a function of parameter groups, the learning rate and its own options."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

Groups = Iterable[dict[str, Any]]


def adamw(groups: Groups, lr: float, betas: tuple[float, float] = (0.9, 0.98)) -> torch.optim.Optimizer:
    """AdamW (Loshchilov and Hutter 2019)."""
    return torch.optim.AdamW(groups, lr=lr, betas=betas, fused=True)


def sgd(groups: Groups, lr: float, momentum: float = 0.9, nesterov: bool = False) -> torch.optim.Optimizer:
    """Stochastic gradient descent; weight decay is part of the gradient."""
    if nesterov and not momentum:
        raise ValueError("optim.nesterov: looks ahead along the momentum, so optim.momentum must be above 0")
    return torch.optim.SGD(groups, lr=lr, momentum=momentum, nesterov=nesterov)


def lion(groups: Groups, lr: float, betas: tuple[float, float] = (0.9, 0.99)) -> torch.optim.Optimizer:
    """Lion (Chen et al. 2023); its authors take a third to a tenth of AdamW's lr, and as much more weight decay."""
    return Lion(groups, {"lr": lr, "betas": betas, "weight_decay": 0.0})


def lars(groups: Groups, lr: float, momentum: float = 0.9, trust: float = 0.001) -> torch.optim.Optimizer:
    """LARS (You et al. 2017), for large batches; groups without weight decay take plain steps, as is usual."""
    return Lars(groups, {"lr": lr, "momentum": momentum, "trust": trust, "weight_decay": 0.0})


class _Momentum(torch.optim.Optimizer):
    """An optimizer that holds one tensor, `momentum`, for each parameter."""

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        assert closure is None
        for group in self.param_groups:
            learning = [p for p in group["params"] if p.grad is not None]
            for p in learning:
                if "momentum" not in self.state[p]:
                    self.state[p]["momentum"] = torch.zeros_like(p)
            if learning:
                grads = [p.grad for p in learning if p.grad is not None]
                self.update(group, learning, grads, [self.state[p]["momentum"] for p in learning])

    @abstractmethod
    def update(self, group: dict[str, Any], weights: list[Tensor], grads: list[Tensor], momenta: list[Tensor]) -> None:
        """One step of a group's tensors, in place."""


class Lion(_Momentum):
    """w <- w - lr (sign(b1 m + (1 - b1) g) + wd w);  m <- b2 m + (1 - b2) g   (algorithm 2)."""

    def update(self, group: dict[str, Any], weights: list[Tensor], grads: list[Tensor], momenta: list[Tensor]) -> None:
        first, second = group["betas"]
        direction = torch._foreach_lerp(momenta, grads, 1 - first)
        torch._foreach_sign_(direction)
        torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(weights, direction, alpha=-group["lr"])
        torch._foreach_lerp_(momenta, grads, 1 - second)


class Lars(_Momentum):
    """m <- mu m + lr * trust |w| / (|g| + wd |w|) * (g + wd w);  w <- w - m   (equations 6 and 7, algorithm 1)."""

    def update(self, group: dict[str, Any], weights: list[Tensor], grads: list[Tensor], momenta: list[Tensor]) -> None:
        decay = group["weight_decay"]
        steps = list(torch._foreach_mul(grads, group["lr"]))
        if decay:
            steps = list(torch._foreach_add(grads, weights, alpha=decay))
            torch._foreach_mul_(steps, [group["lr"] * rate for rate in self._rates(group, weights, grads)])
        torch._foreach_mul_(momenta, group["momentum"])
        torch._foreach_add_(momenta, steps)
        torch._foreach_sub_(weights, momenta)

    def _rates(self, group: dict[str, Any], weights: list[Tensor], grads: list[Tensor]) -> list[Tensor]:
        """The local learning rate of each tensor; 1 where its weights or its gradient are all 0."""
        rates = []
        for own, gradient in zip(torch._foreach_norm(weights), torch._foreach_norm(grads), strict=True):
            rate = group["trust"] * own / (gradient + group["weight_decay"] * own)
            rates.append(torch.where((own > 0) & (gradient > 0), rate, torch.ones_like(rate)))
        return rates
