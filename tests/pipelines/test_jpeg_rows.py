"""JPEGs of which only the upper rows are decoded, compared with decoding all of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import simplejpeg
import torch
import webdataset as wds
from PIL import Image

from configs.schema import Augment
from pipelines.batch import NUM_DRAWS
from pipelines.crop import cut
from pipelines.decode import Jpeg, open_jpeg
from pipelines.geometry import FACTORS
from pipelines.index import index
from pipelines.jpeg_rows import decode_upper
from pipelines.manifest import Manifest
from pipelines.pack import pack
from tests.pipelines.streams import settings, take
from tests.pipelines.test_decode import saved

Painter = Callable[..., Image.Image]
SAMPLINGS = ("444", "422", "420", "411", "440", "Gray")
CORNER = Augment(crop=(0.05, 0.3))


def noisy(rng: np.random.Generator, width: int, height: int) -> Image.Image:
    """Every block and its colours differ from the next, so that a row that is off by one shows."""
    coarse = rng.integers(0, 256, (-(-height // 3), -(-width // 3), 3), dtype=np.uint8)
    return Image.fromarray(np.kron(coarse, np.ones((3, 3, 1), np.uint8))[:height, :width])


def opened(data: bytes) -> Jpeg:
    jpeg = open_jpeg(data)
    assert jpeg is not None
    return jpeg


def upper(data: bytes, rows: int) -> bool:
    jpeg = opened(data)
    return decode_upper(data, jpeg.segments, rows, np.empty((jpeg.height, jpeg.width, 3), np.uint8))


def jpeg_of(rng: np.random.Generator, sampling: str, orientation: int) -> bytes:
    """Of any size and quality, with EXIF."""
    image = noisy(rng, *(int(extent) for extent in rng.integers(1, 200, 2)))
    pixels = np.asarray(image.convert("L"))[..., None] if sampling == "Gray" else np.asarray(image)
    space = "GRAY" if sampling == "Gray" else "RGB"
    quality = int(rng.integers(20, 100))
    data = simplejpeg.encode_jpeg(np.ascontiguousarray(pixels), quality, space, sampling)
    exif = Image.Exif()
    exif[0x0112] = orientation
    segment = exif.tobytes()
    return b"".join((data[:2], b"\xff\xe1", (len(segment) + 2).to_bytes(2, "big"), segment, data[2:]))


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_box_is_bit_for_bit_that_of_the_whole(sampling: str, orientation: int) -> None:
    rng = np.random.default_rng([SAMPLINGS.index(sampling), orientation])
    for _ in range(10):
        jpeg = opened(jpeg_of(rng, sampling, orientation))
        assert jpeg.orientation == orientation
        for factor in (1, *FACTORS):
            if not jpeg.can_shrink(factor) or min(jpeg.width, jpeg.height) < factor:
                continue
            whole = jpeg.decode(factor, fast=True)
            for _ in range(6):
                left, right = sorted(rng.choice(jpeg.width // factor + 1, 2, replace=False).tolist())
                top, bottom = sorted(rng.choice(jpeg.height // factor + 1, 2, replace=False).tolist())
                part = jpeg.decode_box((factor * left, factor * top, factor * right, factor * bottom), factor)
                assert part.shape == whole.shape
                assert np.array_equal(part[top:bottom, left:right], whole[top:bottom, left:right])


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_rows_below_are_left_out_of_every_sampling(sampling: str) -> None:
    image = np.asarray(noisy(np.random.default_rng(0), 100, 130))
    gray = sampling == "Gray"
    data = simplejpeg.encode_jpeg(image[..., :1].copy() if gray else image, 90, "GRAY" if gray else "RGB", sampling)
    assert [upper(data, rows) for rows in (1, 20, 60, 129, 130)] == [True, True, True, False, False]


@pytest.mark.parametrize("options", [{"progressive": True}, {"restart_marker_rows": 1}, {"restart_marker_blocks": 5}])
def test_other_jpegs_are_decoded_in_full(options: dict[str, Any]) -> None:
    data = saved(noisy(np.random.default_rng(0), 100, 90), "JPEG", **options)
    assert np.array_equal(opened(data).decode_box((0, 0, 9, 20)), opened(data).decode(fast=True))


def test_a_cmyk_jpeg_is_decoded_in_full() -> None:
    data = saved(noisy(np.random.default_rng(0), 100, 90).convert("CMYK"), "JPEG")
    assert np.array_equal(opened(data).decode_box((0, 0, 9, 20)), opened(data).decode())


def test_rows_below_are_really_not_decoded() -> None:
    data = saved(noisy(np.random.default_rng(1), 64, 96), "JPEG")
    out = np.full((96, 64, 3), 7, np.uint8)
    assert decode_upper(data, opened(data).segments, 20, out)
    assert (out[32:] == 7).all()
    assert np.array_equal(out[:20], opened(data).decode(fast=True)[:20])


def test_damage_above_and_a_missing_end_are_found() -> None:
    data = saved(noisy(np.random.default_rng(2), 96, 96), "JPEG", quality=90)
    jpeg = opened(data)
    assert upper(data, 30)
    for share in (0.1, 0.3, 0.6, 0.9, 0.999):
        with pytest.raises(ValueError, match="damaged"):
            replace(jpeg, data=data[: int(len(data) * share)]).decode_box((0, 0, 96, 30))
    with pytest.raises(ValueError, match="damaged"):
        replace(jpeg, data=ended_early(data, 0.2)).decode_box((0, 0, 96, 60))


def ended_early(data: bytes, share: float) -> bytes:
    """An end of image in the midst of the pixels: libjpeg complains when it gets there."""
    at = int(len(data) * share)
    return data[:at] + b"\xff\xd9" + data[at + 2 :]


def test_a_crop_of_a_sound_file_is_that_of_any_other() -> None:
    rng = np.random.default_rng(3)
    for number in range(40):
        data = jpeg_of(rng, SAMPLINGS[number % 6], 1 + number % 8)
        drawn = rng.random(NUM_DRAWS, dtype=np.float32)
        for resize in ("crop", "pad", "squash"):
            config = settings(image_size=int(rng.integers(8, 120)), resize=resize)
            expected = cut(data, drawn, config, CORNER)
            assert torch.equal(cut(data, drawn, config, CORNER, sound=True), expected)


def test_without_a_random_crop_all_of_a_file_is_decoded() -> None:
    data = ended_early(saved(noisy(np.random.default_rng(4), 60, 200), "JPEG"), 0.95)
    drawn = np.full(NUM_DRAWS, 0.5, np.float32)  # the middle of what is tall
    cut(data, drawn, settings(), CORNER, sound=True)
    with pytest.raises(ValueError, match="damaged"):
        cut(data, drawn, settings(), Augment(flip=0.5), sound=True)


def test_files_that_were_never_decoded_are_decoded_to_their_end(tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    files = [saved(noisy(rng, 64, 96), "JPEG") for _ in range(8)]
    spoiled = [ended_early(file, 0.97) if number % 2 else file for number, file in enumerate(files)]
    with wds.TarWriter(str(tmp_path / "a.tar")) as writer:
        for number, file in enumerate(spoiled):
            writer.write({"__key__": f"{number:04d}", "jpg": file, "cls": number})
    index([str(tmp_path / "a.tar")])
    indexed = Manifest.open(tmp_path)
    assert not indexed.shard_file(0).decoded
    for batch in take(indexed, settings(augment=CORNER, max_bad_shard_fraction=1.0), 4):
        assert batch.valid.tolist() == (batch.sample[:, 2] % 2 == 0).tolist()


def test_packing_vouches_for_what_it_decoded(tmp_path: Path, folder: Path) -> None:
    pack(folder, tmp_path / "packed")
    assert Manifest.open(tmp_path / "packed").shard_file(0).decoded


def test_a_thumbnail_in_the_header_is_not_taken_for_the_image() -> None:
    rng = np.random.default_rng(6)
    thumbnail = saved(noisy(rng, 16, 12), "JPEG")
    data = saved(noisy(rng, 80, 80), "JPEG")
    data = b"".join((data[:2], b"\xff\xe1", (len(thumbnail) + 2).to_bytes(2, "big"), thumbnail, data[2:]))
    assert data.count(b"\xff\xc0") == 2
    jpeg = opened(data)
    assert upper(data, 30)
    assert np.array_equal(jpeg.decode_box((0, 0, 80, 30))[:30], jpeg.decode(fast=True)[:30])
