"""Images kept decoded change nothing but the time."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from PIL import Image

from configs.schema import Augment
from pipelines.decoded import ENOUGH, Decoded
from pipelines.manifest import Manifest
from pipelines.pack import pack
from pipelines.stream import Loader
from tests.pipelines.streams import assert_equal, settings, take

Painter = Callable[..., Image.Image]
SIDE = 32
CROPPED = Augment(crop=(0.2, 1.0), aspect=2.0)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory, painter: Painter) -> Manifest:
    """Formats, sizes on both sides of where a JPEG is decoded scaled down, all four EXIF turns, transparency."""
    folder = tmp_path_factory.mktemp("mixed")
    for number in range(48):
        (folder / "in" / f"class{number % 6}").mkdir(parents=True, exist_ok=True)
        size = ((20, 40), (63, 63), (64, 30), (150, 90))[number // 3 % 4]
        image, buffer = painter(number, size, "RGBA" if number % 3 == 0 else "RGB"), io.BytesIO()
        exif = Image.Exif()
        exif[0x0112] = (1, 3, 6, 8)[number % 4]
        kind = ("PNG", "JPEG", "JPEG")[number % 3]
        image.save(buffer, kind, exif=exif)
        (folder / "in" / f"class{number % 6}" / f"{number}.{kind.lower()}").write_bytes(buffer.getvalue())
    pack(folder / "in", folder / "out")
    return Manifest.open(folder / "out")


@pytest.mark.parametrize("resize", ["crop", "pad", "squash"])
@pytest.mark.parametrize("augment", [Augment(), CROPPED], ids=["whole", "crops"])
def test_batches_are_the_same_bits_whatever_is_kept(mixed: Manifest, resize: str, augment: Augment) -> None:
    about: dict[str, Any] = {"image_size": SIDE, "resize": resize, "augment": augment, "batch": 16}
    plain = take(mixed, settings(**about, decoded_mb=0), 15)  # five epochs
    for megabytes, threads in ((64, 1), (64, 3), (0.15, 2)):
        kept = take(mixed, settings(**about, decoded_mb=megabytes, threads=threads), 15)
        for batch, other in zip(plain, kept, strict=True):
            assert_equal(batch, other)


def test_a_small_set_is_read_once_and_a_large_one_always(mixed: Manifest) -> None:
    def bytes_read(megabytes: float) -> list[float]:
        data = settings(image_size=SIDE, augment=Augment(), batch=16, decoded_mb=megabytes, prefetch=1)
        with Loader(mixed, data, seed=1) as loader:
            return [next(loader) and loader.counts["bytes_read"] for _ in range(15)]

    small, never = bytes_read(64), bytes_read(0)
    assert small[-1] == small[3] <= never[3] < never[-1]


def test_pixels_are_kept_up_to_the_limit_and_let_go_when_they_are_a_small_part() -> None:
    pixels = np.zeros((10, 10, 3), np.uint8)
    some = Decoded(150 * pixels.nbytes, num_images=300)
    for offset in range(300):
        some.keep((0, offset), pixels)
    assert [some.get((0, offset)) is not None for offset in range(300)] == [True] * 150 + [False] * 150
    few = Decoded(150 * pixels.nbytes, num_images=601)
    for offset in range(ENOUGH):
        assert few.open
        few.keep((0, offset), pixels)
    assert not few.open
    assert few.get((0, 0)) is None
    large = Decoded(pixels.nbytes - 1, num_images=100)
    large.keep((0, 0), pixels)
    assert not large.open
    assert not Decoded(0, num_images=1).open
