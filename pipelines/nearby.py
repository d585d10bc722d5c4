"""Pairs of images that are near by their vectors or pixels, whatever their class: Hadsell, Chopra and LeCun's neighbours."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipelines.decode import decode
from pipelines.hashing import Int64s, hash_ints
from pipelines.records import Records

_TAG_FAR = 121
SIDE = 16  # pixels of the thumbnails that are compared
_BLOCK = 2**22  # distances at once


def thumbnails(records: Records) -> NDArray[np.float32]:
    """Grey pixels of every record's image, SIDE x SIDE.  [n, SIDE * SIDE]. Raises ValueError naming what is no image."""
    found = np.empty((len(records), SIDE * SIDE), np.float32)
    for row, record in enumerate(records):
        try:
            grey = Image.fromarray(decode(record.images[0].read())).convert("L")
        except (ValueError, OSError) as error:
            raise ValueError(f"{record.name}: {error}") from error
        found[row] = np.asarray(grey.resize((SIDE, SIDE), Image.Resampling.BOX), np.float32).reshape(-1) / 255
    return found


def neighbours(vectors: NDArray[np.float32], count: int) -> Int64s:
    """The `count` nearest others of each of vectors [n, E] by euclidean distance; of equally near the first.  [n, count]"""
    n = len(vectors)
    if not 1 <= count < n:
        raise ValueError(f"--per-image {count}: each of {n} images has {n - 1} others")
    exact = vectors.astype(np.float64)
    norms = (exact * exact).sum(1)
    found = np.empty((n, count), np.int64)
    rows = max(1, _BLOCK // n)
    for first in range(0, n, rows):
        block = exact[first : first + rows]
        squared = norms[None, :] - 2 * block @ exact.T
        squared[np.arange(len(block)), first + np.arange(len(block))] = np.inf
        found[first : first + rows] = np.argsort(squared, axis=1, kind="stable")[:, :count]
    return found


def neighbour_pairs(vectors: NDArray[np.float32], count: int, seed: int) -> tuple[Int64s, NDArray[np.int8]]:
    """Each image with its `count` nearest, which match, and with as many others, which do not.  [m, 2] rows, match [m]"""
    near = neighbours(vectors, count)
    n = len(near)
    if n < 2 * count + 1:
        raise ValueError(f"--per-image {count}: {n} images are too few to have as many that are no neighbours")
    anchors = np.repeat(np.arange(n), count)
    barred = np.sort(np.concatenate([near, np.arange(n)[:, None]], 1), axis=1)  # [n, count + 1]
    drawn = hash_ints(seed, _TAG_FAR, anchors, np.tile(np.arange(count), n)) % np.uint64(n - count - 1)
    far = drawn.astype(np.int64)
    for place in range(count + 1):  # skip what is barred, in rising order
        far += far >= barred[anchors, place]
    rows = np.stack([np.repeat(anchors, 2), np.stack([near.reshape(-1), far], 1).reshape(-1)], 1)
    return rows, np.tile(np.asarray([1, 0], np.int8), len(anchors))
