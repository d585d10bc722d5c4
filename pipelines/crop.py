"""From the bytes of an image file to the square of it that an encoder sees."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from configs.schema import Augment, Data
from pipelines.augment import crop_box
from pipelines.decode import decode, open_jpeg
from pipelines.geometry import place, shrink, snap


def cut(
    file: bytes, drawn: NDArray[np.float32], config: Data, augment: Augment, *, sound: bool = False, out: Tensor | None = None
) -> Tensor:
    """Decode a file and resize the part of it that `drawn` [NUM_DRAWS] chooses.  -> uint8 [3, S, S]

    What is chosen depends on the draws, the image's size and whether it is a JPEG. A random crop of a JPEG that is at least
    twice the square is cut at multiples of 2 (4 times: 4, 8 times: 8), so that the JPEG need not be decoded at full size; such
    crops are decoded with libjpeg's fast transform (43 dB from the exact ones), all else exactly.
    `sound`: these bytes have been decoded before, so nothing below a random crop is decoded only to find damage; the result is
    the same.
    Raises ValueError as `decode` does.
    """
    side = config.image_size
    jpeg = open_jpeg(file, max_pixels=config.max_pixels)
    if jpeg is None:
        pixels = decode(file, max_pixels=config.max_pixels)
        height, width = pixels.shape[:2]
        return place(pixels, crop_box(drawn, width, height, side, config.resize, augment), side, out)
    placement = crop_box(drawn, jpeg.width, jpeg.height, side, config.resize, augment)
    if augment.crop is None:  # training sees what evaluation sees, to the last bit, and of damage too
        return place(jpeg.decode(), placement, side, out)
    placement, factor = snap(placement, jpeg.width, jpeg.height)
    if not jpeg.can_shrink(factor):
        factor = 1
    pixels = jpeg.decode_box(placement.box, factor) if sound else jpeg.decode(factor, fast=True)
    return place(pixels, placement if factor == 1 else shrink(placement, factor), side, out)
