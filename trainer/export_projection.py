"""A trained projection as a folder that loads without nearfar and torch, and the proof that it is still the same."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import torch
from torch import nn

from trainer import portable_projection
from trainer.encoders.projection import Projection
from trainer.portable_projection import SETTINGS, WEIGHTS

LEAST_COSINE = 0.9999
TRIED = 64  # random vectors


def export_projection(tower: Projection, folder: Path) -> None:
    """Write projection.npz, projection.json and model.py; an earlier export is replaced.

    Raises ValueError when `folder` holds something else, RuntimeError when it cannot be written, or what was written maps
    vectors otherwise than `tower`.
    """
    if folder.exists() and not (folder / SETTINGS).is_file():
        raise ValueError(f"{folder} exists and is no exported projection; choose another folder or remove it")
    layers = [layer for layer in tower.body if isinstance(layer, nn.Linear)]
    arrays = {}
    for i, layer in enumerate(layers):
        arrays[f"weight{i}"] = layer.weight.detach().float().cpu().numpy()
        bias = torch.zeros(layer.out_features) if layer.bias is None else layer.bias
        arrays[f"bias{i}"] = bias.detach().float().cpu().numpy()
    about = {"version": portable_projection.FORMAT, "input_dim": tower.input_dim, "dim": tower.dim, "layers": len(layers)}
    building = folder.with_name(f"{folder.name}.tmp-{os.getpid()}")
    try:
        building.mkdir(parents=True)
        np.savez(building / WEIGHTS, **arrays)  # type: ignore[arg-type]
        (building / SETTINGS).write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
        shutil.copyfile(portable_projection.__file__, building / "model.py")
        _prove(tower, building)
        shutil.rmtree(folder, ignore_errors=True)
        building.rename(folder)
    except OSError as error:
        raise RuntimeError(f"the positive tower could not be written to {folder}: {error}") from error
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _prove(tower: Projection, folder: Path) -> None:
    given = torch.randn(TRIED, tower.input_dim, generator=torch.Generator().manual_seed(0))
    weight = next(tower.parameters())
    with torch.no_grad():
        expected = tower.eval()(given.to(weight)).double().cpu().numpy()
    cosine = float((portable_projection.Projection(folder)(given.numpy()) * expected).sum(1).min())
    if not cosine > LEAST_COSINE:
        raise RuntimeError(f"the exported projection differs from the trained one: the smallest cosine is {cosine:.6f}")
