"""All that training changes: into a checkpoint and back."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from configs.schema import Train
from trainer import random_state
from trainer.checkpoints import Saved, Snapshot
from trainer.control import Control
from trainer.optim import Average
from trainer.sharding import own_optimizer, own_state, whole_optimizer, whole_state


@dataclass(frozen=True, slots=True)
class Training:
    """Everything a step changes, but for the stream's position."""

    encoder: nn.Module
    average: Average
    objective: nn.Module
    optimizer: torch.optim.Optimizer
    keys: Average | None = None  # the momentum encoder
    control: Control = field(default_factory=lambda: Control(Train(steps=1)))

    def update(self, step: int) -> None:
        """One step of the optimizer, from 1, and of what follows the weights."""
        self.optimizer.step()
        self.average.update(step)
        if self.keys is not None:
            self.keys.update(step)

    def modules(self) -> dict[str, nn.Module]:
        named = {"encoder": self.encoder, "objective": self.objective}
        if self.average.decay > 0:
            named["average"] = self.average.module
        if self.keys is not None:
            named["keys"] = self.keys.module
        if self.control.watches or self.control.early is not None:
            named["control"] = self.control
        return named

    @property
    def device(self) -> torch.device:
        return next(self.encoder.parameters()).device


def snapshot(training: Training) -> Snapshot:
    """The state of modules, optimizer and generators, whole on every rank. Collective: every rank calls it.

    The tensors are the training's own: copy them before it goes on.
    """
    modules = {name: whole_state(module) for name, module in training.modules().items()}
    optimizer = whole_optimizer(training.optimizer, training.objective)
    return Snapshot(modules, optimizer, random_state.gathered(training.device))


def restore(saved: Saved, training: Training) -> None:
    """Load weights, optimizer and generators. Raises ValueError when they do not fit."""
    for name, module in training.modules().items():
        load_module(saved, name, module)
    with saved.store.fetched(saved.name, "optimizer.pt") as path:
        state = torch.load(path, map_location="cpu", weights_only=True)
    training.optimizer.load_state_dict(own_optimizer(training.optimizer, training.objective, state))
    _lay_out(training.optimizer)
    if "random.safetensors" in saved.files:
        with saved.store.fetched(saved.name, "random.safetensors") as path:
            random_state.restore(load_file(path), training.device)


def _lay_out(optimizer: torch.optim.Optimizer) -> None:
    """Give every moment its parameter's strides: fused kernels go through both as they lie in memory, whatever the shapes."""
    for parameter, held in optimizer.state.items():
        for name, moment in held.items():
            if isinstance(moment, Tensor) and moment.shape == parameter.shape and moment.stride() != parameter.stride():
                held[name] = torch.empty_like(parameter, dtype=moment.dtype).copy_(moment)


def load_module(saved: Saved, name: str, module: nn.Module) -> None:
    """Overwrite all tensors of a module with those of the checkpoint's part `name` ("encoder", "average", ...)."""
    with saved.store.fetched(saved.name, f"{name}.safetensors") as path:
        load_weights(module, path)


def load_weights(module: nn.Module, file: Path) -> None:
    """Overwrite all of a module's tensors from a safetensors file."""
    tensors: dict[str, Tensor] = load_file(file)
    try:
        module.load_state_dict(own_state(module, tensors))
    except RuntimeError as error:
        raise ValueError(f"{file} does not fit this config: {error}") from error
