"""Handwritten digits that come with scikit-learn: a data set for when there is no network."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from sklearn.datasets import load_digits

from pipelines.sources.fetched import ClassImage, FetchSummary, Licence, Progress, write_images

SCALE = 4  # 8 x 8 pixels to 32 x 32
LICENCES = (
    Licence(
        "all",
        "E. Alpaydin, C. Kaynak: Optical Recognition of Handwritten Digits, UCI Machine Learning Repository (1998), "
        "<https://doi.org/10.24432/C50P49>, as shipped with scikit-learn (BSD-3-Clause)",
        "CC BY 4.0",
    ),
)


def fetch(out: Path, *, cache: Path | None = None, progress: Progress | None = None) -> FetchSummary:
    """Write the 1,797 digits as PNG, one folder per digit. `cache` is not needed. Raises as `write_images` does."""
    digits = load_digits()
    return write_images(
        out, _images(digits.images, digits.target), LICENCES, title="digits", total=len(digits.target), progress=progress
    )


def _images(images: NDArray[np.float64], targets: NDArray[np.int64]) -> Iterator[ClassImage]:
    grey = np.round(images * (255 / 16)).astype(np.uint8).repeat(SCALE, axis=1).repeat(SCALE, axis=2)
    for index, (pixels, target) in enumerate(zip(grey, targets, strict=True)):
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "PNG")
        yield ClassImage(str(target), f"{index:04d}.png", buffer.getvalue())
