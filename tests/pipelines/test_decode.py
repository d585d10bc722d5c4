"""Decoding and geometry, compared with Pillow's own."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps

from pipelines.decode import decode, read_header
from pipelines.geometry import MAX_STRIP, Placement, place, random_crop, whole
from pipelines.prepare import prepare

Painter = Callable[..., Image.Image]


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def far(one: np.ndarray, other: np.ndarray) -> int:
    assert one.shape == other.shape
    return int(np.abs(one.astype(int) - other.astype(int)).max())


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "GIF", "WEBP"])
def test_lossless_formats_come_out_as_they_went_in(painter: Painter, kind: str) -> None:
    image = painter(1).quantize(32).convert("RGB")
    options = {"lossless": True} if kind == "WEBP" else {}
    assert far(decode(saved(image, kind, **options)), np.asarray(image)) == 0


def test_jpeg_agrees_with_pillow(painter: Painter) -> None:
    for options in ({"quality": 90}, {"quality": 60, "progressive": True}, {"subsampling": "4:4:4"}):
        data = saved(painter(2, (123, 77)), "JPEG", **options)
        assert far(decode(data), np.asarray(Image.open(io.BytesIO(data)))) <= 2
    grey = saved(painter(2, mode="L"), "JPEG")
    assert far(decode(grey), np.asarray(Image.open(io.BytesIO(grey)).convert("RGB"))) <= 2


def test_cmyk_jpeg_agrees_with_pillow(painter: Painter) -> None:
    data = saved(painter(3, mode="CMYK"), "JPEG")
    assert far(decode(data), np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))) <= 2


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_exif_orientation_is_applied(painter: Painter, kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = saved(painter(4), kind, exif=exif)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    assert far(decode(data), np.asarray(expected)) <= 2
    header = read_header(data)
    assert (header.width, header.height) == expected.size


@pytest.mark.parametrize("padding", [b"", b"\xff", b"\xff\xff\xff", b"\xff\xfe\x00\x06note"])
def test_exif_orientation_is_found_behind_other_segments_and_padding(painter: Painter, padding: bytes) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = saved(painter(4), "JPEG", exif=exif)
    at = data.index(b"\xff\xe1")
    data = data[:at] + padding + data[at:]
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    assert expected.size == (32, 40)
    assert far(decode(data), np.asarray(expected)) <= 2


def test_transparency_is_laid_on_white(painter: Painter) -> None:
    image = painter(5, mode="RGBA")
    alpha = np.tile(np.linspace(0, 255, image.width).astype(np.uint8), (image.height, 1))
    image.putalpha(Image.fromarray(alpha))
    pixels = np.asarray(image).astype(np.float64)
    share = pixels[..., 3:] / 255
    expected = pixels[..., :3] * share + 255 * (1 - share)
    assert np.abs(decode(saved(image, "PNG")) - expected).max() <= 1
    palette = Image.new("P", (4, 4), 0)
    palette.putpalette([0, 0, 0, 200, 0, 0])
    palette.putpixel((1, 1), 1)
    found = decode(saved(palette, "PNG", transparency=0))
    assert found[0, 0].tolist() == [255, 255, 255]
    assert found[1, 1].tolist() == [200, 0, 0]
    grey_alpha = Image.fromarray(np.asarray([[[0, 0], [80, 255]]], dtype=np.uint8), "LA")
    assert decode(saved(grey_alpha, "PNG"))[0].tolist() == [[255] * 3, [80] * 3]


def test_other_modes_become_rgb(painter: Painter) -> None:
    assert decode(saved(painter(6, mode="1"), "PNG")).shape == (32, 40, 3)
    sixteen = Image.fromarray(np.asarray([[0, 256 * 100, 65535]], dtype=np.uint16))
    assert decode(saved(sixteen, "PNG"))[0, :, 0].tolist() == [0, 100, 255]
    assert decode(saved(sixteen, "TIFF"))[0, :, 0].tolist() == [0, 100, 255]


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP"])
def test_truncated_files_are_refused(painter: Painter, kind: str) -> None:
    data = saved(painter(7, (80, 60)), kind)
    for share in (0.02, 0.3, 0.8):
        with pytest.raises(ValueError, match=r"damaged|known format|empty"):
            decode(data[: int(len(data) * share)])


NO_IMAGES = [
    b"",
    b"hello, I am a text",
    b"\xff\xd8\xff\xe0 not really",
    b"\x89PNG\r\n\x1a\n" + b"x" * 40,
    b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",  # Pillow would start a PostScript interpreter
]


@pytest.mark.parametrize("data", NO_IMAGES)
def test_what_is_no_image_is_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match=r"empty|known format|damaged"):
        decode(data)


def test_pixel_bombs_are_refused_before_decoding(painter: Painter) -> None:
    for kind in ("PNG", "JPEG"):
        data = saved(Image.new("RGB", (2000, 2000)), kind)
        with pytest.raises(ValueError, match="2000 x 2000 pixels are more than"):
            decode(data, max_pixels=3_999_999)
        assert decode(data, max_pixels=4_000_000).shape == (2000, 2000, 3)


@pytest.mark.parametrize("size", [(100, 60), (61, 100), (48, 48), (20, 33), (300, 7), (7, 300)])
@pytest.mark.parametrize("resize", ["crop", "pad", "squash"])
def test_evaluation_geometry_agrees_with_pillow(painter: Painter, size: tuple[int, int], resize: str) -> None:
    side, image = 48, painter(8, size)
    width, height = size
    scale = side / (min(size) if resize == "crop" else max(size))
    new = (side, side) if resize == "squash" else (max(1, round(width * scale)), max(1, round(height * scale)))
    resized = image.resize(new, Image.Resampling.BILINEAR)
    expected = Image.new("RGB", (side, side), "white")
    left, top = ((side - extent) // 2 if extent <= side else -((extent - side) // 2) for extent in new)
    expected.paste(resized, (left, top))
    found = place(np.array(image), whole(width, height, side, resize), side)
    assert found.shape == (3, side, side)
    assert far(found.permute(1, 2, 0).numpy(), np.asarray(expected)) <= 2


def test_a_strip_of_one_pixel_does_not_become_a_giant() -> None:
    placement = whole(1, 10_000_000, 64, "crop")
    assert placement.size == (64, 64 * MAX_STRIP)
    assert place(np.zeros((10_000, 1, 3), np.uint8), whole(1, 10_000, 64, "crop"), 64).sum() == 0


def test_random_crops_agree_with_pillow(painter: Painter) -> None:
    image = painter(9, (90, 50))
    rng = np.random.default_rng(0)
    for _ in range(50):
        placement = random_crop(rng.random(4, dtype=np.float32), 90, 50, 32, "crop", (0.2, 1.0), 4 / 3)
        left, top, right, bottom = placement.box
        assert 0 <= left < right <= 90
        assert 0 <= top < bottom <= 50
        expected = image.crop(placement.box).resize((32, 32), Image.Resampling.BILINEAR)
        assert far(place(np.array(image), placement, 32).permute(1, 2, 0).numpy(), np.asarray(expected)) <= 2


@pytest.mark.parametrize("resize", ["crop", "pad", "squash"])
def test_random_crops_have_the_area_asked_for(resize: str) -> None:
    rng = np.random.default_rng(1)
    for _ in range(200):
        left, top, right, bottom = random_crop(rng.random(4, dtype=np.float32), 400, 400, 32, resize, (0.3, 0.5), 1.2).box
        assert 0.29 < (right - left) * (bottom - top) / 400**2 < 0.51
        assert 1 / 1.21 < (right - left) / (bottom - top) < 1.21


def test_padded_crops_keep_the_shape_and_show_the_border_white() -> None:
    black = np.zeros((20, 100, 3), np.uint8)
    whole_square = random_crop(np.full(4, 0.5, np.float32), 100, 20, 50, "pad", (1.0, 1.0), 1.0)
    assert whole_square == Placement((0, 0, 100, 20), (50, 10), (0, 20))
    found = place(black, whole_square, 50)
    assert (found[0, 20:30] == 0).all()
    assert (found[0, :20] == 255).all()
    corner = random_crop(np.zeros(4, np.float32), 100, 20, 50, "pad", (0.04, 0.04), 1.0)
    assert (place(black, corner, 50) == 255).all()


def test_packing_keeps_common_formats_and_converts_others(painter: Painter) -> None:
    for kind, suffix in (("JPEG", "jpg"), ("PNG", "png"), ("WEBP", "webp")):
        data = saved(painter(10), kind)
        packed = prepare(data)
        assert (packed.data, packed.suffix, packed.width, packed.height) == (data, suffix, 40, 32)
    for kind in ("BMP", "TIFF", "GIF"):
        data = saved(painter(10), kind)
        packed = prepare(data)
        assert packed.suffix == "png"
        assert far(decode(packed.data), decode(data)) == 0


def test_packing_makes_large_images_smaller(painter: Painter) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    packed = prepare(saved(painter(11, (400, 200)), "JPEG", exif=exif), max_side=100)
    image = Image.open(io.BytesIO(packed.data))
    assert (packed.width, packed.height) == image.size == (50, 100)
    assert image.format == "JPEG"
    assert not image.getexif()
    small = saved(painter(11, (100, 90)), "JPEG")
    assert prepare(small, max_side=100).data == small
