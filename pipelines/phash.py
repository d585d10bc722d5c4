"""What an image looks like in a few bytes, so that its copies are found: made smaller, compressed again, mirrored."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipelines.decode import Pixels
from pipelines.hashing import hash_bytes

SIDE, KEPT = 32, 8  # pixels that are transformed, and coefficients that are kept of them, in each direction
THUMB = 8
FLAT = 4.0  # standard deviation of the grey levels below which an image shows nothing that could be recognised
SHIFT = 0.25  # of a thumbnail's cell: what a resized or cropped copy may be displaced by
TOLERANCE = 16.0  # grey levels by which a cell may differ after that; see tests/pipelines/test_duplicates.py

_places = np.arange(SIDE)
_DCT = np.cos(np.pi * (2 * _places[None, :] + 1) * np.arange(KEPT)[:, None] / (2 * SIDE))  # [8, 32], DCT-II
_MIRROR = (-1.0) ** np.arange(KEPT)  # what mirroring does to the coefficients of a row

Thumbs = NDArray[np.uint8]  # [..., 8, 8, 3]


@dataclass(frozen=True, slots=True)
class Print:
    """Of one image: 63 bits of its exact pixels, 64 bits of how it looks and of how its mirror image does, a thumbnail."""

    pixels: int
    hash: int
    mirrored: int
    thumb: Thumbs
    flat: bool  # nearly one colour: the hash says nothing


def fingerprint(pixels: Pixels) -> Print:
    """The perceptual hash `pHash` of an image: signs, against their median, of its lowest DCT coefficients.  [H, W, 3]

    Source: Zauner, Implementation and Benchmarking of Perceptual Image Hash Functions (2010), chapter 3.2.1.
    """
    image = Image.fromarray(pixels)
    grey = np.asarray(image.convert("L").resize((SIDE, SIDE), Image.Resampling.LANCZOS), dtype=np.float64)
    low = _DCT @ grey @ _DCT.T  # [8, 8]
    thumb = np.asarray(image.resize((THUMB, THUMB), Image.Resampling.BOX))
    exact = hash_bytes(f"{pixels.shape}".encode() + pixels.tobytes())
    return Print(exact, _signs(low), _signs(low * _MIRROR), thumb, bool(grey.std() < FLAT))


def differ(thumbs: Thumbs, others: Thumbs) -> NDArray[np.float64]:
    """By how many grey levels two thumbnails differ where they differ most, beyond what a small shift explains.

    A shift by a part of a cell changes a cell by that part of its difference to its neighbours (first order); whichever of
    `others` and its mirror image is nearer counts.  [n, 8, 8, 3] each -> [n]
    """
    return np.minimum(_excess(thumbs, others), _excess(thumbs, others[:, :, ::-1]))


def _signs(low: NDArray[np.float64]) -> int:
    return int.from_bytes(np.packbits(low > np.median(low)).tobytes(), "big")


def _excess(thumbs: Thumbs, others: Thumbs) -> NDArray[np.float64]:
    allowed = SHIFT * np.minimum(_steepness(thumbs), _steepness(others))
    excess: NDArray[np.float64] = (np.abs(thumbs.astype(np.float64) - others) - allowed).max(axis=(1, 2, 3), initial=0.0)
    return excess


def _steepness(thumbs: Thumbs) -> NDArray[np.float64]:
    """The largest difference of each cell to the four beside it."""
    cells = thumbs.astype(np.float64)
    across, down = np.abs(np.diff(cells, axis=2)), np.abs(np.diff(cells, axis=1))
    steep = np.zeros_like(cells)
    for part, step in ((np.s_[:, :, 1:], across), (np.s_[:, :, :-1], across), (np.s_[:, 1:], down), (np.s_[:, :-1], down)):
        steep[part] = np.maximum(steep[part], step)
    return steep
