"""A traced encoder as an ONNX file, which runs without torch."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch

NEEDED = ("onnx", "onnxscript", "onnxruntime")
EMBEDDED_BYTES = 1_500_000_000  # protobuf holds 2 GB; larger weights go into a file of their own, beside


class NoOnnx(RuntimeError):
    """Why there is no ONNX file."""


def write_onnx(program: torch.export.ExportedProgram, path: Path) -> int:
    """Write `program` (uint8 pixels [n, 3, S, S] -> vectors [n, dim], any n) and return the opset; no other n is fixed.

    Raises NoOnnx when the extra `onnx` is not installed, or the encoder has an operation that ONNX has not.
    """
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise NoOnnx(f"{', '.join(missing)} is not installed (pip install 'nearfar[onnx]')")
    nbytes = sum(tensor.numel() * tensor.element_size() for tensor in program.state_dict.values())
    try:
        with _quietly():
            written = torch.onnx.export(
                program,
                dynamo=True,
                verbose=False,
                input_names=["pixels"],
                output_names=["vectors"],
                dynamic_shapes=({0: "n"},),
            )
            assert written is not None
            written.save(path, external_data=nbytes > EMBEDDED_BYTES)
        _try(path, program)
    except Exception as error:  # the exporter has a dozen kinds of its own
        raise NoOnnx(f"ONNX cannot express the encoder: {' '.join(str(error).split())[:200]}") from error
    return int(written.model.opset_imports[""])


def _try(path: Path, program: torch.export.ExportedProgram) -> None:
    """A batch of 1 and one of 3: an operation may be known to ONNX, and not to the runtime for all sizes."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    side = session.get_inputs()[0].shape[2]
    for n in (1, 3):
        found = session.run(None, {"pixels": torch.zeros((n, 3, side, side), dtype=torch.uint8).numpy()})[0]
        if found.shape[0] != n:
            raise RuntimeError(f"{n} images give {found.shape[0]} vectors")


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Without the exporter's progress, and without its words on torchvision, which nothing here uses."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)
