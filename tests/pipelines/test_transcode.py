"""JPEGs that are written anew, and those that are not."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps

from pipelines.prepare import prepare

Painter = Callable[..., Image.Image]


def jpeg(image: Image.Image, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", **options)
    return buffer.getvalue()


def start_of_frame(data: bytes) -> tuple[int, list[int]]:
    """The marker (0xC0: baseline) and the sampling factors, read from the bytes themselves."""
    place = 2
    while True:
        marker, length = data[place + 1], int.from_bytes(data[place + 2 : place + 4], "big")
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            return marker, [data[place + 11 + 3 * i] for i in range(data[place + 9])]
        place += 2 + length


def turned() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return bytes(exif.tobytes())


ODD: dict[str, dict[str, Any]] = {
    "progressive": {"progressive": True},
    "turned": {"exif": turned()},
    "full colour": {"subsampling": "4:4:4"},
    "all of it": {"progressive": True, "exif": turned(), "subsampling": "4:2:2"},
}


@pytest.mark.parametrize("name", [*ODD, "cmyk"])
def test_a_jpeg_that_decodes_slowly_is_written_anew(painter: Painter, name: str) -> None:
    data = jpeg(painter(1, (90, 60)), quality=95, **ODD[name]) if name in ODD else jpeg(painter(1, (90, 60), mode="CMYK"))
    assert prepare(data).data == data
    packed = prepare(data, reencode=True)
    assert start_of_frame(packed.data) == (0xC0, [0x22, 0x11, 0x11])
    with Image.open(io.BytesIO(packed.data)) as image:
        assert not image.getexif()
        assert image.size == (packed.width, packed.height)
        expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
        assert image.size == expected.size
        assert np.abs(np.asarray(image, np.float64) - np.asarray(expected, np.float64)).mean() < 4


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_a_plain_jpeg_keeps_its_bytes(painter: Painter, mode: str) -> None:
    exif = Image.Exif()
    exif[0x010E] = "a description"
    data = jpeg(painter(2, mode=mode), subsampling="4:2:0", exif=exif) if mode == "RGB" else jpeg(painter(2, mode=mode))
    assert prepare(data, reencode=True, quality=10, max_side=40).data == data


def test_quality_is_of_what_is_written_anew(painter: Painter) -> None:
    data = jpeg(painter(3, (300, 200)), quality=95)
    small, large = (prepare(data, max_side=200, quality=quality) for quality in (30, 95))
    assert (small.width, small.height) == (large.width, large.height) == (200, 133)
    assert len(small.data) < len(large.data) / 2
