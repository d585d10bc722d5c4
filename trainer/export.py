"""A trained encoder as a plain folder that loads without nearfar, and the proof that it is still the same encoder."""

from __future__ import annotations

import copy
import json
import os
import shutil
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from trainer import portable_model
from trainer.portable_model import Encoder, Vectors

MAX_PIXELS = 100_000_000


class FromBytes(nn.Module):
    """The encoder behind uint8 pixels [n, 3, S, S], as they travel and as they are stored."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, pixels: Tensor) -> Tensor:
        vectors: Tensor = self.encoder(pixels.to(torch.float32) / 255)  # [n, dim]
        return vectors


def export_encoder(
    encoder: nn.Module, folder: Path, *, image_size: int, resize: str, card: Mapping[str, Any], max_pixels: int = MAX_PIXELS
) -> None:
    """Write program.pt2, preprocessing.json, model.py and MODEL_CARD.md; an earlier export in `folder` is replaced.

    The program maps uint8 [n, 3, image_size, image_size] to float32 unit vectors [n, dim], any n >= 1, on the CPU.
    `card` maps headings to text, to a list or to a mapping of facts; images above `max_pixels` are refused. `encoder`
    itself is left as it is.
    Raises ValueError when `folder` holds something else, RuntimeError when the encoder cannot be exported.
    """
    if folder.exists() and not (folder / "preprocessing.json").is_file():
        raise ValueError(f"{folder} exists and is no exported encoder; choose another folder or remove it")
    program, dim = _trace(encoder, image_size)
    folder.parent.mkdir(parents=True, exist_ok=True)
    building = folder.with_name(f"{folder.name}.tmp-{os.getpid()}-{uuid.uuid4().hex[:8]}")
    try:
        building.mkdir()
        torch.export.save(program, building / "program.pt2")
        settings = {"version": portable_model.FORMAT, "image_size": image_size, "resize": resize, "dim": dim}
        settings |= {"max_pixels": max_pixels, "torch": torch.__version__}
        (building / "preprocessing.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        shutil.copyfile(portable_model.__file__, building / "model.py")
        (building / "MODEL_CARD.md").write_text(_card(card, settings), encoding="utf-8")
        _replace(folder, building)
    except OSError as error:
        raise RuntimeError(f"the encoder could not be written to {folder}: {error}") from error
    finally:
        shutil.rmtree(building, ignore_errors=True)


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
    parameter = next(encoder.parameters())
    pixels = torch.stack([preprocess(data) for data in images]).to(parameter.device, parameter.dtype) / 255
    training = encoder.training
    encoder.eval()
    try:
        with torch.no_grad():
            ours = encoder(pixels).double().cpu().numpy()
    finally:
        encoder.train(training)
    theirs = np.asarray(exported(images), dtype=np.float64)
    cosines = (ours * theirs).sum(1) / (np.linalg.norm(ours, axis=1) * np.linalg.norm(theirs, axis=1))
    return float(cosines.min())


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
    return program, int(dim)


def _replace(folder: Path, building: Path) -> None:
    old = building.with_name(f"{building.name}.old")
    if folder.exists():
        folder.rename(old)
    building.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def _card(card: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    title = card.get("name", "Image encoder")
    size = settings["image_size"]
    interface = {
        "input": f"images of any size and mode; turned by EXIF, on white, RGB, {settings['resize']} to {size} x {size}",
        "output": f"float32 unit vectors of {settings['dim']} numbers; the dot product of two is their cosine",
        "runs with": f"torch {settings['torch']}, numpy, pillow",
    }
    usage = "```python\nfrom model import Encoder   # the file beside this one\n\n"
    usage += 'vectors = Encoder(".")(["a.jpg", "b.png"])   # [2, dim]; bytes and base64 strings work too\n```'
    sections = {"Interface": interface, "Use": usage, **{k: v for k, v in card.items() if k != "name"}}
    return f"# {title}\n" + "".join(f"\n## {heading}\n\n{_block(body)}\n" for heading, body in sections.items())


def _block(body: Any) -> str:
    if isinstance(body, Mapping):
        return "\n".join(["| | |", "| --- | --- |", *(f"| {key} | {value} |" for key, value in body.items())])
    if isinstance(body, (list, tuple)):
        return "\n".join(f"- {item}" for item in body)
    return str(body)
