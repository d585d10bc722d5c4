"""JPEGs that are decoded at a part of their size for training crops, compared with decoding all of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_images

from configs.schema import Augment, Data
from pipelines.augment import crop_box
from pipelines.batch import NUM_DRAWS
from pipelines.crop import cut
from pipelines.decode import decode, open_jpeg
from pipelines.geometry import FACTORS, place, random_crop, snap, whole
from tests.pipelines.test_decode import saved

Painter = Callable[..., Image.Image]
CROP = Augment(crop=(0.1, 1.0))


@pytest.fixture(scope="module")
def photo() -> Image.Image:
    """640 x 424"""
    return Image.fromarray(load_sample_images().images[0][:424])


def some_draws(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random(NUM_DRAWS, dtype=np.float32)


def settings(side: int, **values: Any) -> Data:
    return Data(train="x", image_size=side, **values)


def decibels(one: torch.Tensor, other: torch.Tensor) -> float:
    """Peak signal to noise."""
    return float(10 * torch.log10(255**2 / (one.double() - other.double()).square().mean()))


def turned(image: Image.Image, orientation: int, **options: Any) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return saved(image, "JPEG", quality=90, exif=exif, **options)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("size", [(640, 424), (637, 423)])
def test_a_pixel_of_a_scaled_decode_shows_the_square_it_stands_for(
    photo: Image.Image, orientation: int, size: tuple[int, int]
) -> None:
    jpeg = open_jpeg(turned(photo.crop((0, 0, *size)), orientation))
    assert jpeg is not None
    full = jpeg.decode()
    assert full.shape == (jpeg.height, jpeg.width, 3)
    assert {jpeg.width, jpeg.height} == set(size)
    for factor in FACTORS:
        scaled = jpeg.decode(factor)
        assert scaled.shape == (-(-jpeg.height // factor), -(-jpeg.width // factor), 3)
        height, width = jpeg.height // factor, jpeg.width // factor
        squares = full[: height * factor, : width * factor].reshape(height, factor, width, factor, 3)
        means, found = torch.from_numpy(squares.mean((1, 3))), torch.from_numpy(scaled[:height, :width])
        if jpeg.can_shrink(factor):
            assert decibels(found, means) > 32
            assert decibels(found[:-1], means[1:]) < 25  # how far one pixel aside is
    assert jpeg.can_shrink(2) == (size == (640, 424) or orientation in (1, 5))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("size", [(640, 424), (637, 423)])
@pytest.mark.parametrize("resize", ["crop", "pad", "squash"])
def test_crops_are_close_to_those_of_a_full_decode(
    photo: Image.Image, orientation: int, size: tuple[int, int], resize: str
) -> None:
    data = turned(photo.crop((0, 0, *size)), orientation)
    pixels = decode(data)
    height, width = pixels.shape[:2]
    for side, area in ((150, (0.9, 1.0)), (64, (0.1, 1.0)), (40, (0.7, 1.0)), (24, (0.02, 1.0))):
        config, augment = settings(side, resize=resize), Augment(crop=area)
        for seed in range(4):
            drawn = some_draws(seed)
            placement = crop_box(drawn, width, height, side, resize, augment)
            expected = place(pixels, snap(placement, width, height)[0], side)
            assert decibels(cut(data, drawn, config, augment), expected) > 28


def test_every_factor_is_used_and_never_below_the_resolution_of_the_square() -> None:
    used = set()
    rng = np.random.default_rng(0)
    for _ in range(500):
        width, height = (int(x) for x in rng.integers(20, 1500, 2))
        resize = ("crop", "pad", "squash")[int(rng.integers(3))]
        before = random_crop(rng.random(4, dtype=np.float32), width, height, 64, resize, (0.05, 1.0), 4 / 3)
        after, factor = snap(before, width, height)
        used.add(factor)
        assert (after.size, after.offset) == (before.size, before.offset)
        if factor == 1:
            assert after == before
            continue
        left, top, right, bottom = after.box
        assert 0 <= left < right <= width
        assert 0 <= top < bottom <= height
        assert all(edge % factor == 0 for edge in after.box)
        assert max(abs(a - b) for a, b in zip(after.box, before.box, strict=True)) < factor
        assert right - left >= factor * after.size[0]
        assert bottom - top >= factor * after.size[1]
    assert used == {1, *FACTORS}


def test_crops_below_twice_the_square_are_what_a_full_fast_decode_gives(photo: Image.Image) -> None:
    data = turned(photo.crop((0, 0, 301, 213)), 1)
    jpeg = open_jpeg(data)
    assert jpeg is not None
    pixels, exact = jpeg.decode(fast=True), decode(data)
    for seed in range(8):
        drawn = some_draws(seed)
        placement = crop_box(drawn, 301, 213, 112, "crop", CROP)
        found = cut(data, drawn, settings(112), CROP)
        assert torch.equal(found, place(pixels, placement, 112))
        assert 37 < decibels(found, place(exact, placement, 112)) < 60


def test_a_crop_is_written_where_it_is_wanted_and_nowhere_else(photo: Image.Image) -> None:
    for image in (saved(photo, "JPEG"), saved(photo, "PNG"), saved(photo.crop((0, 0, 64, 64)), "PNG")):
        for resize, crop in (("crop", (0.1, 1.0)), ("pad", (0.1, 1.0)), ("squash", None)):
            config, augment = settings(64, resize=resize), Augment(crop=crop)
            room = torch.full((3, 64, 64, 3), 7, dtype=torch.uint8).permute(0, 3, 1, 2)
            cut(image, some_draws(), config, augment, out=room[1])
            assert torch.equal(room[1], cut(image, some_draws(), config, augment))
            assert (room[[0, 2]] == 7).all()


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_other_formats_are_decoded_in_full_and_not_snapped(photo: Image.Image, kind: str) -> None:
    data = saved(photo, kind)
    drawn = some_draws()
    expected = place(decode(data), crop_box(drawn, 640, 424, 32, "crop", CROP), 32)
    assert torch.equal(cut(data, drawn, settings(32), CROP), expected)


def test_without_a_crop_a_large_jpeg_is_what_evaluation_sees(photo: Image.Image) -> None:
    data = turned(photo, 6)
    for resize in ("crop", "pad", "squash"):
        expected = place(decode(data), whole(424, 640, 32, resize), 32)
        assert torch.equal(cut(data, some_draws(), settings(32, resize=resize), Augment(flip=0.5)), expected)


def test_a_cmyk_jpeg_is_decoded_in_full(photo: Image.Image) -> None:
    data = saved(photo.convert("CMYK"), "JPEG")
    drawn = some_draws()
    placement, factor = snap(crop_box(drawn, 640, 424, 32, "crop", CROP), 640, 424)
    assert factor > 1
    assert torch.equal(cut(data, drawn, settings(32), CROP), place(decode(data), placement, 32))


def test_damaged_jpegs_are_refused_at_every_scale(photo: Image.Image) -> None:
    whole_file = saved(photo, "JPEG", quality=90)
    for side in (300, 150, 64, 32):  # factors 1, 2, 4, 8
        placement = crop_box(np.zeros(NUM_DRAWS, np.float32), 640, 424, side, "crop", Augment(crop=(1.0, 1.0), aspect=1.0))
        cut(whole_file, np.zeros(NUM_DRAWS, np.float32), settings(side), Augment(crop=(1.0, 1.0), aspect=1.0))
        assert snap(placement, 640, 424)[1] == {300: 1, 150: 2, 64: 4, 32: 8}[side]
        for share in (0.02, 0.3, 0.8, 0.99):
            with pytest.raises(ValueError, match="damaged"):
                cut(
                    whole_file[: int(len(whole_file) * share)],
                    np.zeros(NUM_DRAWS, np.float32),
                    settings(side),
                    Augment(crop=(1.0, 1.0), aspect=1.0),
                )
    with pytest.raises(ValueError, match="640 x 424 pixels are more than"):
        cut(whole_file, some_draws(), settings(32, max_pixels=1000), CROP)
