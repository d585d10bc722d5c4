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
from pipelines.jpeg_rows import SOS, Segments, decode_upper, frame, segments

Pixels = NDArray[np.uint8]  # [H, W, 3]

MAX_PIXELS: int = Data.model_fields["max_pixels"].default
FORMATS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}  # kept as they are when packing
# Named, because some of Pillow's other formats run programs (EPS), and because finding them all at the first image that
# needs it is not safe from several threads.
_READ = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "PPM")
_WHITE = (255, 255, 255, 255)
_ORIENTED = (b"Exif\0\0", b"tiff:Orientation")  # without one of these in its header a JPEG stands upright
_APP1 = 0xE1  # the JPEG segment of metadata
_TURNED = (5, 6, 7, 8)  # EXIF orientations that swap width and height
_FROM_RIGHT, _FROM_BOTTOM = (2, 3, 7, 6), (3, 4, 7, 8)  # whose stored blocks are counted from that side of what is shown
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
    jpeg = open_jpeg(data, max_pixels=max_pixels)
    if jpeg is not None:
        return jpeg.decode()
    with _open(data, max_pixels) as image:
        return _load(image)


def read_header(data: bytes, *, max_pixels: int = MAX_PIXELS) -> Header:
    """Format and size without decoding. Raises ValueError as `decode` does."""
    with _open(data, max_pixels) as image:
        width, height = image.size
        if _orientation(image) in _TURNED:
            width, height = height, width
        return Header(image.format or "", width, height)


@dataclass(frozen=True, slots=True)
class Jpeg:
    """A JPEG whose header has been read; width and height as shown, after EXIF orientation."""

    data: bytes
    width: int
    height: int
    orientation: int
    is_rgb: bool  # False for CMYK and YCCK, which libjpeg-turbo does not turn into RGB
    segments: Segments  # of its header

    def can_shrink(self, factor: int) -> bool:
        """Whether pixel (x, y) of `decode(factor)` shows the pixels from (factor * x, factor * y) on.

        libjpeg counts from the corner stored first: where EXIF puts that to the right or to the bottom, it takes whole blocks.
        """
        across = self.orientation not in _FROM_RIGHT or self.width % factor == 0
        down = self.orientation not in _FROM_BOTTOM or self.height % factor == 0
        return self.is_rgb and across and down

    def decode_box(self, box: tuple[int, int, int, int], factor: int = 1) -> Pixels:
        """As `decode(factor, fast=True)`, bit for bit, inside of `box`: what lies outside may be anything, and rows below cost
        nothing.

        box: left, top, right, bottom at full size, multiples of `factor`. Damage in the rows left out may not be found: for
        files that were decoded once and have not changed since.
        """
        out = np.empty((*self._stored_size(factor), 3), dtype=np.uint8)
        if not self.is_rgb or not decode_upper(self.data, self.segments, self._stored_rows(box), out, factor=factor):
            return self.decode(factor, fast=True)
        return self._upright(out)

    def decode(self, factor: int = 1, *, fast: bool = False) -> Pixels:
        """RGB pixels, upright, all of them or scaled down by a factor of 2, 4 or 8 (the last ones may be of a part).

        `fast`: libjpeg's approximate transform and chroma, a tenth less work and 39 to 45 dB from the exact pixels.

        -> [ceil(H / factor), ceil(W / factor), 3]. Three times faster than Pillow, and strict: raises ValueError for a damaged
        stream where Pillow would return grey blocks.
        """
        if not self.is_rgb:
            with _open(self.data, self.width * self.height) as image:
                return _load(image)
        least = self._stored_size(factor)
        try:
            # simplejpeg takes the smallest scale that leaves this much; without these two it does not scale at all.
            pixels: Pixels = simplejpeg.decode_jpeg(
                self.data, "RGB", fastdct=fast, fastupsample=fast, min_height=least[0], min_width=least[1]
            )
        except ValueError as error:
            raise ValueError(f"damaged: {error}") from None
        assert pixels.shape[:2] == least, f"libjpeg made {pixels.shape[:2]} of {self.height} x {self.width} / {factor}"
        return self._upright(pixels)

    def _upright(self, pixels: Pixels) -> Pixels:
        return pixels if self.orientation == 1 else _turn(pixels, self.orientation)

    def _stored_size(self, factor: int) -> tuple[int, int]:
        """Height and width in the file, scaled down."""
        width, height = -(-self.width // factor), -(-self.height // factor)
        return (width, height) if self.orientation in _TURNED else (height, width)

    def _stored_rows(self, box: tuple[int, int, int, int]) -> int:
        """How many rows of the file, from its first, hold the box."""
        left, top, right, bottom = box
        if self.orientation in _TURNED:
            return self.width - left if self.orientation in _FROM_RIGHT else right
        return self.height - top if self.orientation in _FROM_BOTTOM else bottom


def open_jpeg(data: bytes, *, max_pixels: int = MAX_PIXELS) -> Jpeg | None:
    """Read the header of a JPEG; None when it is of another format. Raises ValueError as `decode` does."""
    if data[:2] != b"\xff\xd8":
        return None
    found = segments(data)
    simple = frame(data, found)
    if simple is not None:
        width, height, components = simple
        is_rgb = components in (1, 3)
    else:
        try:
            height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data)
        except ValueError as error:
            raise ValueError(f"damaged: {error}") from None
        is_rgb = colorspace not in ("CMYK", "YCCK")
    _guard(width, height, max_pixels)
    orientation = 1
    if _has_metadata(data, found):
        with _open(data, max_pixels) as image:
            orientation = _orientation(image)
    if orientation in _TURNED:
        width, height = height, width
    return Jpeg(data, width, height, orientation, is_rgb, found)


def _has_metadata(data: bytes, found: Segments) -> bool:
    """Whether a JPEG may say how it is to be turned. Looks into the segments: searching all of the file takes far longer."""
    for marker, start, end in found:
        if marker == SOS:
            return False
        if marker == _APP1 and any(data.find(mark, start, end) >= 0 for mark in _ORIENTED):
            return True
    return any(mark in data for mark in _ORIENTED)


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
