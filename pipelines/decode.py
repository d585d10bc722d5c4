"""Image bytes to an upright RGB array."""

from __future__ import annotations

import io
import struct
from dataclasses import dataclass

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from configs.schema import Data

Pixels = NDArray[np.uint8]  # [H, W, 3]

MAX_PIXELS: int = Data.model_fields["max_pixels"].default
FORMATS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}  # kept as they are when packing
# Named, because some of Pillow's other formats run programs (EPS), and because finding them all at the first image that
# needs it is not safe from several threads.
_READ = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "PPM")
_WHITE = (255, 255, 255, 255)
_ORIENTED = (b"Exif\0\0", b"tiff:Orientation")  # without one of these in it a JPEG stands upright
_TURNED = (5, 6, 7, 8)  # EXIF orientations that swap width and height
_SIXTEEN_BITS = ("I", "I;16", "I;16B", "I;16L")

# What Pillow's plugins raise for damaged files. MemoryError is not among them.
_DAMAGED = (OSError, ValueError, SyntaxError, IndexError, KeyError, TypeError, struct.error, EOFError)


@dataclass(frozen=True, slots=True)
class Header:
    """What an image file says about itself; width and height as shown, after EXIF orientation."""

    format: str  # as Pillow names it
    width: int
    height: int


def decode(data: bytes, *, max_pixels: int = MAX_PIXELS) -> Pixels:
    """Decode a whole JPEG, PNG, WebP, GIF (first frame), BMP, TIFF or PNM to RGB.  -> [H, W, 3]

    EXIF orientation is applied and transparency laid on white.

    Raises ValueError with the reason when it is no image, is truncated or damaged, or has more than `max_pixels`.
    """
    if data[:2] == b"\xff\xd8":
        return _decode_jpeg(data, max_pixels)
    with _open(data, max_pixels) as image:
        return _load(image)


def read_header(data: bytes, *, max_pixels: int = MAX_PIXELS) -> Header:
    """Format and size without decoding. Raises ValueError as `decode` does."""
    with _open(data, max_pixels) as image:
        width, height = image.size
        if _orientation(image) in _TURNED:
            width, height = height, width
        return Header(image.format or "", width, height)


def _open(data: bytes, max_pixels: int) -> Image.Image:
    if not data:
        raise ValueError("the file is empty")
    try:
        image = Image.open(io.BytesIO(data), formats=_READ)
    except UnidentifiedImageError:
        raise ValueError("not an image of a known format") from None
    except Image.DecompressionBombError as error:  # Pillow's own guard, at 179 million pixels
        raise ValueError(str(error)) from None
    except _DAMAGED as error:
        raise ValueError(f"damaged: {error}") from error
    _guard(*image.size, max_pixels)
    return image


def _guard(width: int, height: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise ValueError(f"{width} x {height} pixels are more than data.max_pixels = {max_pixels}")


def _decode_jpeg(data: bytes, max_pixels: int) -> Pixels:
    """Three times faster than Pillow, and strict: a damaged stream raises where Pillow would return grey blocks."""
    try:
        height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError as error:
        raise ValueError(f"damaged: {error}") from None
    _guard(width, height, max_pixels)
    if colorspace in ("CMYK", "YCCK"):  # libjpeg-turbo does not turn it into RGB
        with _open(data, max_pixels) as image:
            return _load(image)
    try:
        pixels: Pixels = simplejpeg.decode_jpeg(data, "RGB")
    except ValueError as error:
        raise ValueError(f"damaged: {error}") from None
    if not any(mark in data for mark in _ORIENTED):
        return pixels
    with _open(data, max_pixels) as image:
        return _turn(pixels, _orientation(image))


def _load(image: Image.Image) -> Pixels:
    try:
        image.load()
        if _orientation(image) != 1:  # exif_transpose would copy even an upright image
            image = ImageOps.exif_transpose(image)
        return np.array(_on_white(image))  # a copy, because torch wants to own what it wraps
    except _DAMAGED as error:
        raise ValueError(f"damaged: {error}") from error


def _on_white(image: Image.Image) -> Image.Image:
    """RGB from any mode."""
    if image.mode in _SIXTEEN_BITS:
        # Pillow's own conversion clips at 255: sixteen bits would turn white.
        high = np.asarray(image).astype(np.int64) >> 8
        return Image.fromarray(np.clip(high, 0, 255).astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, _WHITE), image).convert("RGB")
    return image.convert("RGB")


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(0x0112, 1))
    except _DAMAGED:
        return 1


def _turn(pixels: Pixels, orientation: int) -> Pixels:
    """Undo the EXIF orientation 1..8 by flips and quarter turns."""
    if orientation in (2, 5, 7, 4):
        pixels = pixels[:, ::-1] if orientation != 4 else pixels[::-1]
    quarters = {3: 2, 5: 1, 6: 3, 7: 3, 8: 1}.get(orientation, 0)
    return np.ascontiguousarray(np.rot90(pixels, quarters))
