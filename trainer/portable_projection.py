"""The positive tower of an exported encoder, for given vectors (e.g. text embeddings); needs numpy and nothing else.

    from model import Projection
    project = Projection(".")          # the folder that this file lies in
    vectors = project(given)           # [m, input_dim] -> float32 [m, dim], of length 1

Its vectors are compared with those of the anchor tower, the folder above.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

FORMAT = 1
SETTINGS, WEIGHTS = "projection.json", "projection.npz"


class Projection:
    """Layers of `weight` [out, in] and `bias` [out], GELU between them. Raises ValueError for a format it does not know."""

    def __init__(self, folder: str | Path) -> None:
        settings = json.loads((Path(folder) / SETTINGS).read_text(encoding="utf-8"))
        if settings["version"] != FORMAT:
            raise ValueError(f"{folder} has version {settings['version']}, this reads {FORMAT}; use the model.py beside it")
        self.input_dim, self.dim = int(settings["input_dim"]), int(settings["dim"])
        with np.load(Path(folder) / WEIGHTS, allow_pickle=False) as held:
            self._layers = [(held[f"weight{i}"], held[f"bias{i}"]) for i in range(int(settings["layers"]))]

    def __call__(self, given: ArrayLike) -> NDArray[np.float32]:
        """Vectors [m, input_dim] to unit vectors [m, dim]. Raises ValueError for another shape."""
        x: NDArray[Any] = np.asarray(given, dtype=np.float64)
        if x.ndim != 2 or x.shape[1] != self.input_dim:
            raise ValueError(f"vectors [m, {self.input_dim}] are meant, got {list(x.shape)}")
        for i, (weight, bias) in enumerate(self._layers):
            x = (x if i == 0 else _gelu(x)) @ weight.astype(np.float64).T + bias
        length = np.linalg.norm(x, axis=1, keepdims=True)
        unit: NDArray[np.float32] = np.divide(x, length, out=np.zeros_like(x), where=length > 0).astype(np.float32)
        return unit


def _gelu(x: NDArray[Any]) -> NDArray[Any]:
    erf = np.asarray(np.frompyfunc(math.erf, 1, 1)(x / math.sqrt(2)), dtype=np.float64)
    return 0.5 * x * (1 + erf)
