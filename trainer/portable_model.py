"""The encoder as it leaves the house: this file is copied, as model.py, beside the weights it loads.

Needs torch, numpy and pillow; nothing of nearfar. With MLflow it is a pyfunc model (models-from-code); without:
`from model import Encoder; vectors = Encoder(folder)(["cat.jpg", open("dog.png", "rb").read()])   # [2, dim]`
"""

from __future__ import annotations

import base64
import binascii
import io
import json
import os
import struct
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import PIL
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

FORMAT = 1
STRIP = 64  # an image longer than this times its width is cut to its middle before it grows to the square
CHUNK = 256  # images decoded and encoded at once; bounds the memory of a long column

# What Pillow's readers raise for damaged files; not MemoryError.
DAMAGED = (
    OSError,
    ValueError,
    SyntaxError,
    IndexError,
    KeyError,
    TypeError,
    EOFError,
    struct.error,
    Image.DecompressionBombError,
)

Vectors: TypeAlias = npt.NDArray[np.float32]
Pixels: TypeAlias = npt.NDArray[np.uint8]


class Encoder:
    """Images to unit vectors, with the preprocessing the encoder was trained for."""

    def __init__(self, folder: str | Path) -> None:
        settings = json.loads((Path(folder) / "preprocessing.json").read_text(encoding="utf-8"))
        if settings.get("version") != FORMAT:
            raise ValueError(
                f"{folder} holds format {settings.get('version')!r}; this code reads {FORMAT}: use its own model.py"
            )
        self.image_size = int(settings["image_size"])
        self.resize = str(settings["resize"])
        self.dim = int(settings["dim"])
        self.max_pixels = int(settings["max_pixels"])
        self._program = torch.export.load(Path(folder) / "program.pt2").module()

    def __call__(self, images: Sequence[Any]) -> Vectors:
        """Encode `images`, each bytes, a base64 string or a path, to unit vectors [n, dim]; ValueError names a bad one."""
        vectors = np.empty((len(images), self.dim), dtype=np.float32)
        for start in range(0, len(images), CHUNK):
            pixels = np.stack([self._pixels(i, images[i]) for i in range(start, min(start + CHUNK, len(images)))])
            with torch.no_grad():
                vectors[start : start + len(pixels)] = self._program(torch.from_numpy(pixels)).numpy()
        return vectors

    def _pixels(self, row: int, value: Any) -> Pixels:
        try:
            return preprocess(read_image(value), self.image_size, self.resize, self.max_pixels)
        except UnidentifiedImageError:
            raise ValueError(f"row {row} is not an image in a format that Pillow {PIL.__version__} knows") from None
        except DAMAGED as error:
            raise ValueError(f"row {row} is not a readable image: {error}") from error


def read_image(value: Any) -> bytes:
    """The bytes of an image given as bytes, as the path of a file, or as base64 (a data URL too)."""
    if isinstance(value, (bytes, bytearray, memoryview)):
        return bytes(value)
    if isinstance(value, Path):
        return value.read_bytes()
    if not isinstance(value, str):
        raise ValueError(f"expected bytes, a base64 string or a path, got {type(value).__name__}")
    if os.path.isfile(value):
        return Path(value).read_bytes()
    text = value.split(",", 1)[1] if value.startswith("data:") and "," in value else value
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError):
        shown = value if len(value) <= 80 else f"{value[:77]}..."
        raise ValueError(f"{shown!r} is neither a file on this machine nor base64") from None


def preprocess(data: bytes, size: int, resize: str, max_pixels: int) -> Pixels:
    """Decode to uint8 [3, size, size]: EXIF turn, on white, RGB, then `resize` is crop, pad or squash (bilinear)."""
    with Image.open(io.BytesIO(data)) as image:
        if image.width * image.height > max_pixels:
            raise ValueError(f"{image.width} x {image.height} is more than {max_pixels} pixels")
        rgb = to_rgb(ImageOps.exif_transpose(image))
    return np.ascontiguousarray(np.asarray(fit(rgb, size, resize)).transpose(2, 0, 1))


def to_rgb(image: Image.Image) -> Image.Image:
    """Any mode to RGB; transparent pixels show white, 16-bit grey keeps its high byte."""
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def fit(image: Image.Image, size: int, resize: str) -> Image.Image:
    """RGB of any shape to size x size: the centre of the short side's fit, the whole on white, or squashed."""
    width, height = image.size
    if resize == "squash":
        return image.resize((size, size), Image.Resampling.BILINEAR)
    if resize not in ("crop", "pad"):
        raise ValueError(f"resize is crop, pad or squash, got {resize!r}")
    if resize == "crop" and max(width, height) > STRIP * min(width, height):
        strip = STRIP * min(width, height)
        left, top = max(0, width - strip) // 2, max(0, height - strip) // 2
        width, height = min(width, strip), min(height, strip)
        image = image.crop((left, top, left + width, top + height))
    scale = size / (min if resize == "crop" else max)(width, height)
    least = size if resize == "crop" else 1
    width, height = max(least, round(width * scale)), max(least, round(height * scale))
    image = image.resize((width, height), Image.Resampling.BILINEAR)
    if resize == "crop":
        left, top = (width - size) // 2, (height - size) // 2
        return image.crop((left, top, left + size, top + size))
    canvas = Image.new("RGB", (size, size), "white")
    canvas.paste(image, ((size - width) // 2, (size - height) // 2))
    return canvas


def column(table: Any) -> list[Any]:
    """The images of a DataFrame (column `image`, or its only one), a mapping, an array, a list, or one image."""
    if isinstance(table, (bytes, str, Path)):
        return [table]
    if isinstance(table, dict) or hasattr(table, "columns"):
        names = [str(name) for name in table]
        if "image" not in names and len(names) != 1:
            raise ValueError(f"expected one column, or one named 'image'; got the columns {names}")
        table = table["image"] if "image" in names else table[next(iter(table))]
    if isinstance(table, np.ndarray):
        table = table.reshape(-1)
    rows = list(table)
    return [next(iter(row.values())) if isinstance(row, dict) and len(row) == 1 else row for row in rows]


if "mlflow" in sys.modules and not __name__.startswith("trainer."):  # the copy, run by MLflow as models-from-code
    import mlflow
    import pandas as pd  # type: ignore[import-untyped]

    class PortableModel(mlflow.pyfunc.PythonModel):  # type: ignore[misc]
        """A column of images to unit vectors, float32 [n, dim]."""

        def load_context(self, context: Any) -> None:
            self._encoder = Encoder(context.artifacts["encoder"])

        # the hint DataFrame is one that MLflow lets pass as it is; without a hint it warns at every load
        def predict(self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None) -> Vectors:
            return self._encoder(column(model_input))

    mlflow.models.set_model(PortableModel())
