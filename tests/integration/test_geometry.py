"""The exported model sees the pixels that evaluation saw, whatever the shape of the image."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from pipelines.decode import decode
from pipelines.geometry import place, whole
from trainer.portable_model import preprocess


@pytest.mark.parametrize("resize", ["crop", "pad", "squash"])
@pytest.mark.parametrize(
    "size", [(160, 120), (120, 160), (97, 31), (31, 97), (33, 32), (32, 35), (5, 400), (64, 64), (1, 1), (20, 9)]
)
def test_the_exported_preprocessing_agrees_within_one_grey_level(size: tuple[int, int], resize: str) -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    seen = decode(buffer.getvalue())
    trained = place(seen, whole(size[0], size[1], 32, resize), 32).numpy().astype(int)
    exported = preprocess(buffer.getvalue(), 32, resize, 10**6).astype(int)
    assert np.abs(trained - exported).max() <= 1
