"""Checkpoints: written beside, checked, then renamed, so that what is there is whole.

    checkpoints/step-00000200/  encoder.safetensors  average.safetensors  objective.safetensors  optimizer.pt  state.json

`state.json` is written last and holds a checksum of every other file.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from configs.schema import Train
from trainer.control import Control
from trainer.optim import Average
from trainer.sharding import own_optimizer, own_state, whole_optimizer, whole_state

VERSION = 1
logger = logging.getLogger(__name__)


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


@dataclass(frozen=True, slots=True)
class Saved:
    """What a checkpoint says of itself."""

    path: Path
    step: int
    position: int
    identity: Mapping[str, Any]  # the settings that decide what a run computes
    sources: Sequence[Mapping[str, Any]] = ()  # the data that the stream was made of


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What a checkpoint holds of the training."""

    modules: Mapping[str, Mapping[str, Tensor]]
    optimizer: Mapping[str, Any]


def snapshot(training: Training) -> Snapshot:
    """The state of all modules and the optimizer, whole on every rank. Collective: every rank calls it."""
    modules = {name: whole_state(module) for name, module in training.modules().items()}
    return Snapshot(modules, whole_optimizer(training.optimizer, training.objective))


def save(
    folder: Path,
    taken: Snapshot,
    *,
    step: int,
    position: int,
    identity: Mapping[str, Any],
    keep: int,
    sources: Sequence[Mapping[str, Any]] = (),
) -> Path:
    """Write `folder`/step-N and drop all but the newest `keep`. One rank calls it.

    Raises RuntimeError when the disk is full; the checkpoints that were there stay.
    """
    final = folder / f"step-{step:08d}"
    temporary = folder / f".{final.name}.{os.getpid()}"
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        for name, state in taken.modules.items():
            tensors = {key: value.detach().cpu().contiguous() for key, value in state.items()}
            save_file(tensors, temporary / f"{name}.safetensors")
        torch.save(taken.optimizer, temporary / "optimizer.pt")
        files = {path.name: _checksum(path) for path in sorted(temporary.iterdir())}
        about = {"version": VERSION, "step": step, "position": position, "identity": identity}
        about |= {"sources": list(sources), "files": files}
        (temporary / "state.json").write_text(json.dumps(about, indent=1))
        shutil.rmtree(final, ignore_errors=True)
        temporary.rename(final)
    except OSError as error:
        raise RuntimeError(f"cannot write the checkpoint {final}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    for old in _all(folder)[keep:]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def newest(folder: Path) -> Saved | None:
    """The newest complete checkpoint; incomplete or damaged ones are passed over with a warning."""
    for path in _all(folder):
        try:
            return read(path)
        except ValueError as error:
            logger.warning("checkpoint passed over: %s", error)
    return None


def read(path: Path) -> Saved:
    """Check every file of one checkpoint.

    Raises ValueError that says what is wrong with it.
    """
    try:
        state = json.loads((path / "state.json").read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: no readable state.json ({error})") from error
    if state.get("version") != VERSION:
        raise ValueError(f"{path}: written as version {state.get('version')}, this nearfar reads version {VERSION}")
    for name, checksum in state["files"].items():
        file = path / name
        if not file.is_file():
            raise ValueError(f"{path}: {name} is missing")
        if _checksum(file) != checksum:
            raise ValueError(f"{path}: {name} is damaged (its checksum differs)")
    return Saved(path, state["step"], state["position"], state["identity"], state.get("sources", ()))


def restore(saved: Saved, training: Training) -> None:
    """Load the weights and the optimizer's state. Raises ValueError when they do not fit."""
    for name, module in training.modules().items():
        load_weights(module, saved.path / f"{name}.safetensors")
    state = torch.load(saved.path / "optimizer.pt", map_location="cpu", weights_only=True)
    training.optimizer.load_state_dict(own_optimizer(training.optimizer, training.objective, state))


def load_weights(module: nn.Module, file: Path) -> None:
    """Overwrite all of a module's tensors from a safetensors file."""
    tensors: dict[str, Tensor] = load_file(file)
    try:
        module.load_state_dict(own_state(module, tensors))
    except RuntimeError as error:
        raise ValueError(f"{file} does not fit this config: {error}") from error


def _all(folder: Path) -> list[Path]:
    """Checkpoints, newest first."""
    return sorted(folder.glob("step-*"), reverse=True)


def _checksum(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
