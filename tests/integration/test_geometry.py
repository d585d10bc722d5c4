"""The exported model sees the pixels that evaluation saw, whatever the shape of the image."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cluster.building import plain
from configs.schema import Data
from pipelines.decode import decode
from pipelines.geometry import place, whole
from pipelines.manifest import Manifest
from pipelines.pack import pack
from pipelines.stream import evaluation_batches
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


def test_an_encoder_gets_evaluation_images_with_channels_first_in_memory(tmp_path: Path) -> None:
    for name in ("a/1.png", "a/2.png", "b/1.png"):
        (tmp_path / "im" / name).parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(len(name)).integers(0, 256, (20, 30, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "im" / name)
    pack(tmp_path / "im", tmp_path / "out")
    (batch,) = evaluation_batches(Manifest.open(tmp_path / "out"), Data(train="x", image_size=16))
    found = plain(torch.device("cpu"), torch.float64)(batch)
    assert found.is_contiguous()  # an encoder's sums would round otherwise
    assert torch.equal(found * 255, batch.images.double())
