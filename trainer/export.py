"""A trained encoder as a plain folder that loads without nearfar, and the proof that it is still the same encoder."""

from __future__ import annotations

import copy
import json
import os
import shutil
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from trainer import portable_model
from trainer.encoders import is_raw
from trainer.model_card import model_card
from trainer.onnx_program import NoOnnx, write_onnx
from trainer.portable_model import Encoder, Vectors

MAX_PIXELS = 100_000_000
PARITY_BATCH = 32
PROGRAM, ONNX, SETTINGS, ABOUT, CARD = "program.pt2", "model.onnx", "preprocessing.json", "about.json", "MODEL_CARD.md"


class FromBytes(nn.Module):
    """The encoder behind uint8 pixels [n, 3, S, S], as they travel and as they are stored."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        self.raw = is_raw(encoder)

    def forward(self, pixels: Tensor) -> Tensor:
        vectors: Tensor = self.encoder(pixels.to(torch.float32) / 255)  # [n, dim]
        return vectors


@dataclass(frozen=True, slots=True)
class Exported:
    """What was written: `runtime` onnx, or torch and then `why_torch`."""

    runtime: Literal["onnx", "torch"]
    why_torch: str | None


def export_encoder(
    encoder: nn.Module,
    folder: Path,
    *,
    image_size: int,
    resize: str,
    card: Mapping[str, Any],
    max_pixels: int = MAX_PIXELS,
    dims: Sequence[int] = (),
    thresholds: Mapping[int, Mapping[str, float]] = MappingProxyType({}),
    about: Mapping[str, Any] = MappingProxyType({}),
    onnx: bool = True,
) -> Exported:
    """Write model.onnx, program.pt2, preprocessing.json, model.py, about.json and MODEL_CARD.md; an earlier export is replaced.

    Both programs map uint8 [n, 3, image_size, image_size] to float32 vectors [n, dim], any n >= 1, on the CPU; model.py
    runs the ONNX one, and program.pt2 where there is none. `card` maps headings to text, to a list or to a mapping of facts;
    images above `max_pixels` are refused; `dims`: shorter lengths that the encoder was trained for; `thresholds`: for each
    length name -> cosine (raw: distance); `about`: what is told of the model wherever it goes. `encoder` is left as it is.
    Raises ValueError when `folder` holds something else, RuntimeError when the encoder cannot be exported.
    """
    if folder.exists() and not (folder / SETTINGS).is_file():
        raise ValueError(f"{folder} exists and is no exported encoder; choose another folder or remove it")
    program, dim = _trace(encoder, image_size)
    folder.parent.mkdir(parents=True, exist_ok=True)
    building = folder.with_name(f"{folder.name}.tmp-{os.getpid()}-{uuid.uuid4().hex[:8]}")
    try:
        building.mkdir()
        torch.export.save(program, building / PROGRAM)
        opset, why = _onnx(program, building / ONNX) if onnx else (None, "it was not asked for")
        settings = {
            "version": portable_model.FORMAT,
            "runtime": "torch" if opset is None else "onnx",
            "image_size": image_size,
            "resize": resize,
            "dim": dim,
            "distance": "euclidean" if is_raw(encoder) else "cosine",
            "dims": sorted({*dims, dim}),
            "thresholds": {str(length): dict(at) for length, at in thresholds.items()},
            "max_pixels": max_pixels,
            "torch": torch.__version__,
            "opset": opset,
        }
        for name, content in ((SETTINGS, settings), (ABOUT, about)):
            (building / name).write_text(json.dumps(dict(content), indent=2) + "\n", encoding="utf-8")
        shutil.copyfile(portable_model.__file__, building / "model.py")
        (building / CARD).write_text(model_card(card, settings), encoding="utf-8")
        _replace(folder, building)
    except OSError as error:
        raise RuntimeError(f"the encoder could not be written to {folder}: {error}") from error
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return Exported("onnx" if why is None else "torch", why)


def _onnx(program: torch.export.ExportedProgram, path: Path) -> tuple[int | None, str | None]:
    """The opset, or why there is none."""
    try:
        return write_onnx(program, path), None
    except NoOnnx as error:
        for part in path.parent.glob(f"{path.name}*"):
            part.unlink()
        return None, str(error)


def load_exported(folder: Path) -> Callable[[Sequence[bytes]], Vectors]:
    """The exported encoder as a function of encoded images, by the code that MLflow runs."""
    return Encoder(folder)


def parity(
    encoder: nn.Module,
    exported: Callable[[Sequence[bytes]], Vectors],
    images: Sequence[bytes],
    preprocess: Callable[[bytes], Tensor],
) -> float:
    """Smallest cosine between `exported` and `encoder` behind the trainer's own `preprocess` (bytes -> uint8 [3, S, S])."""
    return least_cosine(trained_vectors(encoder, images, preprocess), exported(images))


def trained_vectors(encoder: nn.Module, images: Sequence[bytes], preprocess: Callable[[bytes], Tensor]) -> Vectors:
    """What `encoder` makes of encoded images, a few at a time.  -> [n, dim]"""
    parameter, training = next(encoder.parameters()), encoder.training
    encoder.eval()
    found = []
    try:
        with torch.no_grad():
            for start in range(0, len(images), PARITY_BATCH):
                pixels = torch.stack([preprocess(data) for data in images[start : start + PARITY_BATCH]])
                found.append(encoder(pixels.to(parameter.device, parameter.dtype) / 255).float().cpu())
    finally:
        encoder.train(training)
    vectors: Vectors = torch.cat(found).numpy()
    return vectors


def least_cosine(ours: Vectors, theirs: Vectors) -> float:
    """The smallest over the rows of two [n, dim]; NaN where a row is NaN."""
    a, b = np.asarray(ours, dtype=np.float64), np.asarray(theirs, dtype=np.float64)
    return float(((a * b).sum(1) / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1))).min())


def largest_error(ours: Vectors, theirs: Vectors) -> float:
    """The largest distance between the rows of two raw [n, dim], as a share of how far ours lie from their mean (root of the
    mean square); NaN where a row is NaN.
    """
    a, b = np.asarray(ours, dtype=np.float64), np.asarray(theirs, dtype=np.float64)
    spread, length = (float(np.sqrt((x * x).sum(1).mean())) for x in (a - a.mean(0), a))
    return float(np.linalg.norm(a - b, axis=1).max() / max(spread, 1e-3 * length, 1e-12))


def _trace(encoder: nn.Module, image_size: int) -> tuple[torch.export.ExportedProgram, int]:
    portable = FromBytes(copy.deepcopy(encoder).to(device="cpu", dtype=torch.float32).eval())
    for tensor in (*portable.parameters(), *portable.buffers()):
        tensor.data = tensor.data.contiguous()  # channels-last weights make torch.export.save warn
    pixels = torch.randint(0, 256, (2, 3, image_size, image_size), dtype=torch.uint8)  # a batch of 1 would freeze the 1
    try:
        with torch.no_grad():
            dim = portable(pixels).shape[1]
            program = torch.export.export(portable, (pixels,), dynamic_shapes=({0: torch.export.Dim("n", min=1)},))
    except Exception as error:
        raise RuntimeError(f"torch.export cannot trace {type(encoder).__name__}: {error}") from error
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # paths of this machine, which are nobody else's business
    return program, int(dim)


def _replace(folder: Path, building: Path) -> None:
    old = building.with_name(f"{building.name}.old")
    if folder.exists():
        folder.rename(old)
    building.rename(folder)
    shutil.rmtree(old, ignore_errors=True)
