"""The encoder as it leaves the house: this file is copied, as model.py, beside the weights it loads.

Needs numpy, pillow and onnxruntime; nothing of nearfar, and torch only where the folder holds no model.onnx. With MLflow it
is a pyfunc model (models-from-code); without:
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
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import PIL
from PIL import Image, ImageOps, UnidentifiedImageError

FORMAT = 2
STRIP = 64  # an image longer than this times its width is cut to its middle before it grows to the square
CHUNK = 256  # images decoded and encoded at once; bounds the memory of a long column
LARGEST_CHUNK = 2**22  # pixels of a side squared, times images: large images go in smaller chunks
# The formats that training reads. Others are left out, because to read them Pillow would start programs (EPS).
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "PPM")

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

Vectors: TypeAlias = npt.NDArray[np.float32]  # of unit length, unless the model is raw
Codes: TypeAlias = npt.NDArray[np.int8]
Pixels: TypeAlias = npt.NDArray[np.uint8]


class Encoder:
    """Images to vectors, with the preprocessing the encoder was trained for.

    distance: what tells vectors apart. `cosine`: they have unit length; `euclidean`: they are raw, of any length.

    dims: the lengths its vectors may be cut to (`dim=`); thresholds: for each of them {name: cosine}, from which on two images
    show the same thing: `far_1e-3` calls one in 1000 different pairs the same, `best_f1` is right most often; both were
    measured on the evaluation set, and empty without one. Those of a raw model are distances, up to which they do.
    """

    def __init__(self, folder: str | Path, *, paths: bool = True) -> None:
        """paths: whether a string may name a file of this machine; say False where strings come from somebody else."""
        settings = json.loads((Path(folder) / "preprocessing.json").read_text(encoding="utf-8"))
        if settings.get("version") != FORMAT:
            raise ValueError(
                f"{folder} holds format {settings.get('version')!r}; this code reads {FORMAT}: use its own model.py"
            )
        self.image_size = int(settings["image_size"])
        self.resize = str(settings["resize"])
        self.dim = int(settings["dim"])
        self.distance = str(settings.get("distance", "cosine"))
        self.dims = tuple(int(dim) for dim in settings["dims"])
        self.thresholds: dict[int, dict[str, float]] = {int(dim): dict(at) for dim, at in settings["thresholds"].items()}
        self.max_pixels = int(settings["max_pixels"])
        self.paths = paths
        self._run = {"onnx": _onnx, "torch": _torch}[settings["runtime"]](Path(folder))

    def __call__(self, images: Sequence[Any], *, dim: int | None = None) -> Vectors:
        """Encode `images`, each bytes, a base64 string or a path, to vectors [n, dim].

        dim: cut to so many numbers, one of `dims`, and scaled to unit length again. ValueError names a bad image by its row.
        """
        dim = self._allowed(dim)
        vectors = np.empty((len(images), self.dim), dtype=np.float32)
        chunk = max(1, min(CHUNK, LARGEST_CHUNK // self.image_size**2))
        for start in range(0, len(images), chunk):
            pixels = np.stack([self._pixels(i, images[i]) for i in range(start, min(start + chunk, len(images)))])
            vectors[start : start + len(pixels)] = self._run(pixels)
        return vectors if dim == self.dim else shortened(vectors, dim)

    def match(self, a: Any, b: Any, *, at: str = "far_1e-3", dim: int | None = None) -> npt.NDArray[np.bool_]:
        """Whether a[i] and b[i] show the same thing: their cosine is at least the threshold `at`, or, of a raw model,
        their distance at most that.  -> [n]

        a, b: as many images each, or one image each. Raises ValueError as above, and where there is no such threshold.
        """
        dim = self._allowed(dim)
        known = self.thresholds.get(dim, {})
        if at not in known:
            there = ", ".join(known) or "none: it was exported without an evaluation set; compare the vectors yourself"
            raise ValueError(f"this model has no match threshold {at!r}; it has {there}")
        first, second = column(a), column(b)
        if len(first) != len(second):
            raise ValueError(f"match compares image by image, and got {len(first)} and {len(second)}")
        ours, theirs = self(first, dim=dim), self(second, dim=dim)
        matched: npt.NDArray[np.bool_]
        if self.distance == "euclidean":
            matched = np.linalg.norm(ours.astype(np.float64) - theirs, axis=1) <= known[at]
        else:
            matched = (ours * theirs).sum(1) >= known[at]
        return matched

    def require_unit(self, what: str) -> None:
        """Raise ValueError where vectors are raw: they keep their length and all of their numbers."""
        if self.distance != "cosine":
            raise ValueError(f"{what} is for vectors of length 1; those of this model are raw, compared by euclidean distance")

    def _allowed(self, dim: int | None) -> int:
        if dim is None or dim in self.dims:
            return self.dim if dim is None else int(dim)
        self.require_unit(f"dim {dim}")
        raise ValueError(
            f"dim {dim} is none of the lengths that this model was trained for: {', '.join(map(str, self.dims))}"
            + ("" if len(self.dims) > 1 else " (a loss with `matryoshka` trains for more)")
        )

    def _pixels(self, row: int, value: Any) -> Pixels:
        try:
            return preprocess(read_image(value, paths=self.paths), self.image_size, self.resize, self.max_pixels)
        except UnidentifiedImageError:
            raise ValueError(f"row {row} is not an image; known are {', '.join(FORMATS)} (Pillow {PIL.__version__})") from None
        except DAMAGED as error:
            raise ValueError(f"row {row} is not a readable image: {error}") from error


def _onnx(folder: Path) -> Callable[[Pixels], Vectors]:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda pixels: session.run(None, {name: pixels})[0]


def _torch(folder: Path) -> Callable[[Pixels], Vectors]:
    import torch

    program = torch.export.load(folder / "program.pt2").module()

    def run(pixels: Pixels) -> Vectors:
        with torch.no_grad():
            return program(torch.from_numpy(pixels)).numpy()  # type: ignore[no-any-return]

    return run


def shortened(vectors: Vectors, dim: int) -> Vectors:
    """The first `dim` numbers, scaled to unit length."""
    cut = vectors[:, :dim]
    short: Vectors = cut / np.maximum(np.linalg.norm(cut, axis=1, keepdims=True), 1e-12)
    return short


def to_int8(vectors: Vectors) -> Codes:
    """Times 127, rounded: a quarter of the bytes. Divided by 127 again, cosines differ by 0.003 on average."""
    codes: Codes = np.rint(vectors * 127).astype(np.int8)
    return codes


def read_image(value: Any, *, paths: bool = True) -> bytes:
    """The bytes of an image given as bytes, as base64 (a data URL too), or, with `paths`, as the path of a file."""
    if isinstance(value, (bytes, bytearray, memoryview)):
        return bytes(value)
    if isinstance(value, Path) and paths:
        return value.read_bytes()
    if not isinstance(value, str):
        raise ValueError(f"expected bytes, a base64 string or a path, got {type(value).__name__}")
    if paths and os.path.isfile(value):
        return Path(value).read_bytes()
    text = value.split(",", 1)[1] if value.startswith("data:") and "," in value else value
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError):
        shown = value if len(value) <= 80 else f"{value[:77]}..."
        expected = "neither a file on this machine nor base64" if paths else "not base64, and files are not read here"
        raise ValueError(f"{shown!r} is {expected}") from None


def preprocess(data: bytes, size: int, resize: str, max_pixels: int) -> Pixels:
    """Decode to uint8 [3, size, size]: EXIF turn, on white, RGB, then `resize` is crop, pad or squash (bilinear)."""
    with Image.open(io.BytesIO(data), formats=FORMATS) as image:
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


def served() -> bool:
    """Whether a server of MLflow answers requests in this process: then strings come from its clients."""
    servers = ("mlflow.pyfunc.scoring_server.app", "mlserver")
    return os.environ.get("_MLFLOW_IS_IN_SERVING_ENVIRONMENT") == "true" or any(name in sys.modules for name in servers)


if "mlflow" in sys.modules and not __name__.startswith("trainer."):  # the copy, run by MLflow as models-from-code
    import mlflow
    import pandas as pd  # type: ignore[import-untyped]
    from mlflow.exceptions import MlflowException
    from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE

    class Refused(MlflowException):  # type: ignore[misc]
        """Input that is no image: a server answers 400. Its message stays: MLflow would put all of the input before it."""

        def __setattr__(self, name: str, value: Any) -> None:
            if name != "message" or name not in self.__dict__:
                super().__setattr__(name, value)

    class PortableModel(mlflow.pyfunc.PythonModel):  # type: ignore[misc]
        """A column of images to vectors, float32 [n, dim]; `params`: dim, and int8 for vectors times 127, rounded.

        A string may be the path of a file where a program calls `predict`, never where a server does: its clients must
        not read or look for files of its machine. `load_model(..., model_config={"paths": False})` forbids it anywhere.
        """

        def load_context(self, context: Any) -> None:
            self._paths = bool((context.model_config or {}).get("paths", True))
            self._encoder = Encoder(context.artifacts["encoder"])

        # the hint DataFrame is one that MLflow lets pass as it is; without a hint it warns at every load
        def predict(
            self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None
        ) -> npt.NDArray[np.float32 | np.int8]:
            self._encoder.paths = self._paths and not served()
            wanted = params or {}
            try:
                if wanted.get("int8"):
                    self._encoder.require_unit("int8")
                vectors = self._encoder(column(model_input), dim=wanted.get("dim"))
            except ValueError as error:
                raise Refused(str(error), error_code=INVALID_PARAMETER_VALUE) from error
            return to_int8(vectors) if wanted.get("int8") else vectors

    mlflow.models.set_model(PortableModel())
