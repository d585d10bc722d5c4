"""What learns at which rate, and averaged weights."""

from __future__ import annotations

import copy
from collections.abc import Iterable

import torch
from torch import nn

from configs.registry import build
from configs.schema import Optim, Part
from trainer.encoders.stages import stage_numbers
from trainer.sharding import sharded_parameters

OPTIONS = ("betas", "momentum", "nesterov", "trust")  # each belongs to some optimizers; left at null it is theirs


def build_optimizer(optim: Optim, modules: Iterable[nn.Module]) -> torch.optim.Optimizer:
    """The optimizer over all trainable parameters of `modules`, the first of which is the encoder; each parameter once.

    Weight decay is for matrices and kernels only: no biases, norms, temperatures (fewer than 2 dimensions), and nothing
    under the names in an encoder's `undecayed`. A group's `lr_scale` is its share of the learning rate.
    Raises ValueError for an option that the optimizer does not have.
    """
    encoder, *others = modules
    parameters = list(dict.fromkeys(p for module in (encoder, *others) for p in module.parameters() if p.requires_grad))
    if optim.name == "lars" and any(sharded_parameters(module) for module in others):
        raise ValueError("optim.name: lars needs the norm of whole tensors; set shard: false in the loss, or take adamw or sgd")
    plain = {p for name, p in encoder.named_parameters() if name in getattr(encoder, "undecayed", ())}
    scale = {p: optim.loss_lr for module in others for p in module.parameters()} | _rates(encoder, optim.layer_decay)
    groups = []
    for share in sorted({scale.get(p, 1.0) for p in parameters}, reverse=True):
        own = [p for p in parameters if scale.get(p, 1.0) == share]
        decayed = [p for p in own if p.ndim >= 2 and p not in plain]
        rest = [p for p in own if p.ndim < 2 or p in plain]
        groups += [
            {"params": decayed, "weight_decay": optim.weight_decay, "lr_scale": share},
            {"params": rest, "weight_decay": 0.0, "lr_scale": share},
        ]
    given = {key: getattr(optim, key) for key in OPTIONS if getattr(optim, key) is not None}
    part = Part.model_validate({"name": optim.name, **given})
    kept = [g for g in groups if g["params"]]
    optimizer: torch.optim.Optimizer = build("optim", part, torch.optim.Optimizer, groups=kept, lr=optim.lr)
    return optimizer


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give every group its share of `rate`."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("lr_scale", 1.0)


def _rates(encoder: nn.Module, decay: float) -> dict[nn.Parameter, float]:
    """Shares of the learning rate: `decay` for every stage that follows (Clark et al. 2020; Bao et al. 2022)."""
    if decay == 1.0:
        return {}
    stage = stage_numbers(encoder)
    last = max(stage.values())
    return {p: decay ** (last - stage[name]) for name, p in encoder.named_parameters()}


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
