"""One image or vector on its way into a shard: checked by really decoding it, measured, and transcoded where needed."""

from __future__ import annotations

import io
import zlib
from dataclasses import dataclass

import simplejpeg
from PIL import Image

from pipelines.decode import FORMATS, MAX_PIXELS, Pixels, decode, read_header
from pipelines.hashing import hash_bytes
from pipelines.vectors import decode_vector, encode_vector, is_vector

JPEG_QUALITY = 92
_ORIENTATION = 0x0112  # of EXIF


@dataclass(frozen=True, slots=True)
class PackedImage:
    """The bytes that go into the tar and what the manifest says about them."""

    data: bytes
    suffix: str
    width: int
    height: int
    crc32: int
    uid: int
    dim: int = 0  # numbers of a vector; 0: an image


def prepare(
    data: bytes,
    *,
    max_side: int | None = None,
    quality: int = JPEG_QUALITY,
    reencode: bool = False,
    max_pixels: int = MAX_PIXELS,
) -> PackedImage:
    """Check an image, or a vector, and bring it into the form in which it is stored.

    JPEG, PNG and WebP keep their bytes unless the longest side is above `max_side`, or with `reencode` for a JPEG that is not
    upright, baseline and 4:2:0 (or grey). Everything else becomes PNG. What is written anew stands upright, without metadata.
    Raises ValueError with the reason when it cannot be decoded.
    """
    if is_vector(data):
        return prepare_vector(data)
    header = read_header(data, max_pixels=max_pixels)
    pixels = decode(data, max_pixels=max_pixels)
    width, height, suffix = header.width, header.height, FORMATS.get(header.format)
    too_large = max_side is not None and max(width, height) > max_side
    if suffix is None or too_large or (reencode and suffix == "jpg" and not _is_plain_jpeg(data)):
        suffix = "jpg" if suffix == "jpg" else "png"
        data, width, height = _encode(pixels, suffix, max_side if too_large else None, quality)
    return PackedImage(data, suffix, width, height, zlib.crc32(data), hash_bytes(data))


def prepare_vector(data: bytes) -> PackedImage:
    """Check a `.npy` vector and write it as float32, so that the same numbers are the same bytes.

    Raises ValueError with the reason when it is none.
    """
    vector = decode_vector(data)
    data = encode_vector(vector)
    return PackedImage(data, "npy", 0, 0, zlib.crc32(data), hash_bytes(data), dim=len(vector))


def _is_plain_jpeg(data: bytes) -> bool:
    """Whether it is upright, baseline, and 4:2:0 or grey: what decodes fastest."""
    _, _, _, subsampling = simplejpeg.decode_jpeg_header(data)
    with Image.open(io.BytesIO(data), formats=("JPEG",)) as image:
        upright = image.getexif().get(_ORIENTATION, 1) == 1
        return upright and "progressive" not in image.info and image.mode in ("RGB", "L") and subsampling in ("420", "Gray")


def _encode(pixels: Pixels, suffix: str, max_side: int | None, quality: int) -> tuple[bytes, int, int]:
    """Upright baseline JPEG 4:2:0 or PNG, made smaller to `max_side`."""
    image = Image.fromarray(pixels)
    if max_side is not None:
        scale = max_side / max(image.size)
        image = image.resize(
            (max(1, round(image.width * scale)), max(1, round(image.height * scale))), Image.Resampling.LANCZOS
        )
    buffer = io.BytesIO()
    if suffix == "jpg":
        image.save(buffer, "JPEG", quality=quality, subsampling="4:2:0")
    else:
        image.save(buffer, "PNG")
    return buffer.getvalue(), image.width, image.height
