"""Fingerprints of images, against the package imagehash."""

from __future__ import annotations

import imagehash
import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_images

from pipelines.phash import TOLERANCE, differ, fingerprint
from tests.pipelines.conftest import paint


def photos() -> list[np.ndarray]:
    """Different parts of two photographs, of different sizes."""
    rng = np.random.default_rng(0)
    parts = []
    for photo in load_sample_images().images:
        for _ in range(20):
            height, width = rng.integers(40, 200, 2)
            top, left = rng.integers(0, photo.shape[0] - height), rng.integers(0, photo.shape[1] - width)
            parts.append(np.ascontiguousarray(photo[top : top + height, left : left + width]))
    return parts


def test_the_hash_is_that_of_imagehash() -> None:
    for pixels in [*photos(), *(np.asarray(paint(seed)) for seed in range(20))]:
        theirs = int(str(imagehash.phash(Image.fromarray(pixels))), 16)
        assert fingerprint(pixels).hash == theirs


def test_the_mirrored_hash_is_the_hash_of_the_mirror_image() -> None:
    for pixels in photos():
        mirror = np.ascontiguousarray(pixels[:, ::-1])
        # Pillow's resizing rounds to whole grey levels, so a coefficient at the median may fall on its other side.
        assert (fingerprint(pixels).mirrored ^ fingerprint(mirror).hash).bit_count() <= 2


def test_a_thumbnail_forgives_a_small_shift_and_nothing_else() -> None:
    def thumb(image: Image.Image) -> np.ndarray:
        return fingerprint(np.asarray(image)).thumb[None]

    image = paint(3, (200, 160))
    shifted = image.crop((2, 2, 200, 160))
    changed = image.copy()
    changed.paste((0, 0, 0), (100, 80, 130, 100))
    assert differ(thumb(image), thumb(shifted))[0] < TOLERANCE
    assert differ(thumb(image), thumb(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)))[0] < 1
    assert differ(thumb(image), thumb(changed))[0] > 2 * TOLERANCE


def test_images_of_one_colour_are_flat() -> None:
    noise = np.random.default_rng(0).integers(250, 256, (50, 50, 3), dtype=np.uint8)
    assert fingerprint(noise).flat
    assert not fingerprint(np.asarray(paint(0))).flat
