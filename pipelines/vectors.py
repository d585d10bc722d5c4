"""Vectors that stand in for images: numpy's `.npy` format, written in one way and read without running anything."""

from __future__ import annotations

import io
import tokenize
from functools import lru_cache

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

Vector = NDArray[np.float32]  # [E]

MAGIC = b"\x93NUMPY"
_READERS = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}
_DAMAGED = (ValueError, SyntaxError, TypeError, KeyError, IndexError, RecursionError, MemoryError, tokenize.TokenError)


def is_vector(data: bytes) -> bool:
    """Whether the bytes begin like a `.npy` file."""
    return data.startswith(MAGIC)


def decode_vector(data: bytes, dim: int | None = None) -> Vector:
    """The numbers in a `.npy` file, which must be `dim` if that is given.  -> [E] float32

    float16 and float64 are converted. Raises ValueError with the reason when it is damaged, no vector of floats, holds numbers
    that are not finite, or anything that would have to be unpickled.
    """
    start = _start(data)
    count, kind = _read_header(data[:start])
    if len(data) - start != count * kind.itemsize:
        raise ValueError(f"damaged: {len(data) - start} bytes of numbers, where {count} of {kind.itemsize} bytes are announced")
    if dim is not None and count != dim:
        raise ValueError(f"a vector of {count} numbers, not {dim}")
    with np.errstate(over="ignore", invalid="ignore"):
        vector = np.frombuffer(data, kind, offset=start).astype(np.float32)
    if not np.isfinite(vector).all():
        raise ValueError("a number that is not finite in float32 (nan or inf)")
    return vector


def encode_vectors(vectors: NDArray[np.float32]) -> NDArray[np.uint8]:
    """The bytes of a `.npy` file for each row, the same on every machine.  [n, E] -> [n, bytes]"""
    header = np.frombuffer(_header(vectors.shape[1]), np.uint8)
    numbers = np.ascontiguousarray(vectors, "<f4").view(np.uint8)
    return np.concatenate([np.broadcast_to(header, (len(vectors), len(header))), numbers], axis=1)


def encode_vector(vector: Vector) -> bytes:
    """The bytes of a `.npy` file."""
    return encode_vectors(vector[None]).tobytes()


def _start(data: bytes) -> int:
    """Where the numbers begin."""
    if not is_vector(data):
        raise ValueError("no .npy file")
    width = {1: 2, 2: 4}.get(int.from_bytes(data[6:7], "little"))
    if width is None or len(data) < 8 + width:
        raise ValueError("damaged, or a .npy file of another version than 1 and 2")
    start = 8 + width + int.from_bytes(data[8 : 8 + width], "little")
    if start > len(data):
        raise ValueError("damaged: the header of the .npy file is cut off")
    return start


@lru_cache(maxsize=64)  # nearly always the same one; numpy takes as long for it as for thousands of numbers
def _read_header(header: bytes) -> tuple[int, np.dtype[np.generic]]:
    """Length and type. Raises ValueError unless it is of a vector of floats."""
    file = io.BytesIO(header)
    try:
        shape, _, kind = _READERS[npy.read_magic(file)](file)  # literals only: nothing in it is run
    except _DAMAGED as error:
        raise ValueError(f"damaged: the header of the .npy file cannot be read ({type(error).__name__})") from None
    if kind.hasobject:
        raise ValueError("a .npy file of Python objects, which are never read: loading them can run programs")
    if kind.kind != "f" or kind.itemsize > 8:
        raise ValueError(f"a .npy file of {kind}; a vector is of float32 (or float16, float64)")
    if len(shape) != 1 or shape[0] < 1:
        raise ValueError(f"a .npy file of shape {shape}; a vector has one dimension")
    return int(shape[0]), kind


@lru_cache(maxsize=64)
def _header(dim: int) -> bytes:
    file = io.BytesIO()
    npy.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": (dim,)})
    return file.getvalue()
