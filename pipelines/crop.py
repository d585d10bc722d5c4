"""From the bytes of an image file to the square of it that an encoder sees."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from configs.schema import Augment, Data
from pipelines.augment import crop_box
from pipelines.decode import Pixels, decode, open_jpeg
from pipelines.geometry import never_snaps, place, shrink, snap


def cut(
    file: bytes,
    drawn: NDArray[np.float32],
    config: Data,
    augment: Augment,
    *,
    sound: bool = False,
    keep: Callable[[Pixels], None] | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Decode a file and resize the part of it that `drawn` [NUM_DRAWS] chooses.  -> uint8 [3, S, S]

    What is chosen depends on the draws, the image's size and whether it is a JPEG. A random crop of a JPEG that is at least
    twice the square is cut at multiples of 2 (4 times: 4, 8 times: 8), so that the JPEG need not be decoded at full size; such
    crops are decoded with libjpeg's fast transform (43 dB from the exact ones), all else exactly.
    `sound`: these bytes have been decoded before, so nothing below a random crop is decoded only to find damage; the result is
    the same. `keep` gets the pixels of an image of which `cut_decoded` makes the same for any draws.
    Raises ValueError as `decode` does.
    """
    side = config.image_size
    jpeg = open_jpeg(file, max_pixels=config.max_pixels)
    if jpeg is None:
        return _whole(decode(file, max_pixels=config.max_pixels), drawn, config, augment, keep, out)
    if augment.crop is None:  # training sees what evaluation sees, to the last bit, and of damage too
        return _whole(jpeg.decode(), drawn, config, augment, keep, out)
    if keep is not None and never_snaps(jpeg.width, jpeg.height, side, config.resize):
        return _whole(jpeg.decode(fast=True), drawn, config, augment, keep, out)
    placement = crop_box(drawn, jpeg.width, jpeg.height, side, config.resize, augment)
    placement, factor = snap(placement, jpeg.width, jpeg.height)
    if not jpeg.can_shrink(factor):
        factor = 1
    pixels = jpeg.decode_box(placement.box, factor) if sound else jpeg.decode(factor, fast=True)
    return place(pixels, placement if factor == 1 else shrink(placement, factor), side, out)


def cut_decoded(
    pixels: Pixels, drawn: NDArray[np.float32], config: Data, augment: Augment, out: Tensor | None = None
) -> Tensor:
    """The part of a decoded image that `drawn` [NUM_DRAWS] chooses, resized.  [H, W, 3] -> uint8 [3, S, S]"""
    height, width = pixels.shape[:2]
    placement = crop_box(drawn, width, height, config.image_size, config.resize, augment)
    return place(pixels, placement, config.image_size, out)


def _whole(
    pixels: Pixels,
    drawn: NDArray[np.float32],
    config: Data,
    augment: Augment,
    keep: Callable[[Pixels], None] | None,
    out: Tensor | None,
) -> Tensor:
    if keep is not None:
        keep(pixels)
    return cut_decoded(pixels, drawn, config, augment, out)
