"""That an exported encoder is the trained one: both see the same real images."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor, nn

from configs.schema import Data, RunConfig
from pipelines.decode import decode
from pipelines.geometry import place, whole
from pipelines.manifest import Manifest
from pipelines.mixture import open_sources
from pipelines.read import Reader
from trainer.encoders import is_raw
from trainer.export import largest_error, least_cosine, trained_vectors
from trainer.portable_model import Vectors

LEAST_COSINE = 0.9999  # between the trained encoder and what is shipped
LARGEST_ERROR = 0.02  # of raw vectors; the angle of that cosine is 0.014
IMAGES, JPEGS = 256, 32
JPEG = b"\xff\xd8"


@dataclass(frozen=True, slots=True)
class Proof:
    """Encoded images, and what the trained encoder makes of them behind the decoder and the geometry of evaluation."""

    images: list[bytes]
    vectors: Vectors  # [n, dim]
    raw: bool = False

    def check(self, exported: Any) -> None:
        """exported: encoded images -> vectors. Raises RuntimeError when any differs from the trained encoder's."""
        theirs = exported(self.images)
        if self.raw:
            error = largest_error(self.vectors, theirs)
            if not error <= LARGEST_ERROR:
                raise RuntimeError(f"of {len(self.images)} images, the largest error to the trained encoder is {error:.6f}")
            return
        cosine = least_cosine(self.vectors, theirs)
        if not cosine > LEAST_COSINE:
            raise RuntimeError(f"of {len(self.images)} images, the smallest cosine to the trained encoder is {cosine:.6f}")


def prove(config: RunConfig, encoder: nn.Module) -> Proof:
    """256 images of `data.eval`, or of `data.train` without one; where they are no JPEGs, also some of them made into JPEGs.

    Raises ValueError when none of them can be read.
    """
    manifest = _images_of(config)
    images = sample(manifest, config.data, IMAGES)
    if not images:
        raise ValueError(
            f"{manifest.location} holds no image that can be read, so the export cannot be proven to be the encoder"
        )
    images += [_as_jpeg(image) for image in images[: JPEGS if images[0][:2] != JPEG else 0]]
    return Proof(images, trained_vectors(encoder, images, lambda data: seen(data, config.data)), is_raw(encoder))


def seen(image: bytes, data: Data) -> Tensor:
    """Encoded bytes to what evaluation sees, uint8 [3, S, S]. Raises ValueError when they cannot be read."""
    pixels = decode(image, max_pixels=data.max_pixels)
    return place(pixels, whole(pixels.shape[1], pixels.shape[0], data.image_size, data.resize), data.image_size)


def sample(manifest: Manifest, data: Data, number: int) -> list[bytes]:
    """At most `number` encoded images that can be read, of records evenly spread over the data set."""
    reader, found = Reader(manifest, data), []
    number = min(number, manifest.num_samples)
    try:
        for i in range(number):
            record = i * manifest.num_samples // number
            shard = int(np.searchsorted(manifest.starts, record, side="right")) - 1
            image = _read(manifest, reader, shard, record - int(manifest.starts[shard]))
            if _readable(image, data):
                found.append(image)
    finally:
        reader.close()
    return found


def _read(manifest: Manifest, reader: Reader, shard: int, row: int) -> bytes:
    """The first image of a record."""
    table = manifest.table(shard)
    first, end = int(table.start[row]), int(table.start[row + 1])
    at = first + int((table.dim[first:end] == 0).argmax())
    return reader.read(shard, int(table.offset[at]), int(table.size[at]), int(table.crc32[at]))


def _readable(image: bytes, data: Data) -> bool:
    try:
        seen(image, data)
    except ValueError:
        return False
    return True


def _images_of(config: RunConfig) -> Manifest:
    if config.data.eval is not None:
        return Manifest.open(config.data.eval, cache=config.data.cache)
    return open_sources(config.data.train, config.data.cache)


def _as_jpeg(image: bytes) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(decode(image)).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def example(side: int = 64) -> bytes:
    """A made image, for where there is none of the data at hand."""
    ramp = np.linspace(0, 255, side, dtype=np.uint8)
    grid: Sequence[Any] = np.meshgrid(ramp, ramp)
    buffer = io.BytesIO()
    Image.fromarray(np.stack([*grid, grid[0][::-1]], -1)).save(buffer, "PNG")
    return buffer.getvalue()
