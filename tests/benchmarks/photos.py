"""Photographs to measure with: crops of scikit-learn's two sample photos, packed as pairs."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
from PIL import Image
from sklearn.datasets import load_sample_images

from pipelines.manifest import Manifest
from pipelines.pack import pack

QUALITY = 90


def pack_photos(folder: Path, width: int, height: int, *, pairs: int) -> Manifest:
    """`pairs` of different JPEGs of width x height in a data set in `folder`."""
    files = [_jpeg(photo) for photo in _crops(width, height, 2 * pairs)]
    table = pa.table({"anchor": files[:pairs], "positive": files[pairs:]})
    pyarrow.parquet.write_table(table, folder / "pairs.parquet")
    pack(folder / "pairs.parquet", folder / "shards", kind="pair")
    return Manifest.open(folder / "shards")


def packed_files(manifest: Manifest) -> list[bytes]:
    """The bytes of every image of a data set."""
    files = []
    for shard in range(len(manifest.sizes)):
        table, data = manifest.table(shard), manifest.shard_path(shard).read_bytes()
        files += [data[at : at + size] for at, size in zip(table.offset.tolist(), table.size.tolist(), strict=True)]
    return files


def _crops(width: int, height: int, count: int) -> list[Image.Image]:
    rng = np.random.default_rng(0)
    photos = [_at_least(photo, width, height) for photo in load_sample_images().images]
    crops = []
    for index in range(count):
        photo = photos[index % len(photos)]
        top = int(rng.integers(photo.shape[0] - height + 1))
        left = int(rng.integers(photo.shape[1] - width + 1))
        crops.append(Image.fromarray(photo[top : top + height, left : left + width]))
    return crops


def _at_least(photo: np.ndarray, width: int, height: int) -> np.ndarray:
    """Mirrored copies side by side: enlarging it instead would leave a JPEG too little to decode."""
    while photo.shape[1] < width:
        photo = np.concatenate([photo, photo[:, ::-1]], axis=1)
    while photo.shape[0] < height:
        photo = np.concatenate([photo, photo[::-1]], axis=0)
    return photo


def _jpeg(photo: Image.Image) -> bytes:
    buffer = io.BytesIO()
    photo.save(buffer, "JPEG", quality=QUALITY)
    return buffer.getvalue()
