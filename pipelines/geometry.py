"""Which part of an image goes where in the S x S square that an encoder sees."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from pipelines.decode import Pixels

WHITE = 255
MAX_STRIP = 64
FACTORS = (8, 4, 2)  # by which libjpeg scales down while it decodes


class Placement(NamedTuple):
    """Cut `box` out, resize it to `size`, and lay it at `offset` on a white square; what sticks out is cut off."""

    box: tuple[int, int, int, int]  # left, top, right, bottom in the image
    size: tuple[int, int]  # width, height
    offset: tuple[int, int]  # x, y, negative to cut


def whole(width: int, height: int, side: int, resize: str) -> Placement:
    """The geometry of evaluation, embedding and export for an image of width x height.

    `resize`: crop = short side to S and centre crop, pad = long side to S on white, squash = S x S whatever the shape.
    """
    if resize == "squash":
        return Placement((0, 0, width, height), (side, side), (0, 0))
    # A strip of one pixel by millions would become a giant when its short side grows to S: only its middle counts.
    strip = MAX_STRIP * min(width, height) if resize == "crop" else max(width, height)
    cut_x, cut_y = max(0, width - strip) // 2, max(0, height - strip) // 2
    width, height = min(width, strip), min(height, strip)
    box = (cut_x, cut_y, cut_x + width, cut_y + height)
    least = side if resize == "crop" else 1
    scale = side / (min(width, height) if resize == "crop" else max(width, height))
    new_width, new_height = (max(least, round(extent * scale)) for extent in (width, height))
    return Placement(box, (new_width, new_height), (_centred(new_width, side), _centred(new_height, side)))


def _centred(extent: int, side: int) -> int:
    """Where `extent` begins in the middle of `side`; an odd rest goes to the far end, whichever of the two is longer."""
    return (side - extent) // 2 if extent <= side else -((extent - side) // 2)


def random_crop(
    draws: NDArray[np.float32], width: int, height: int, side: int, resize: str, area: tuple[float, float], aspect: float
) -> Placement:
    """A random part of the image, `area` of it, of an aspect ratio in [1/aspect, aspect], resized to the square.

    draws: [4] in [0, 1): area, aspect, x, y. With resize = pad the part is cut from the image with its white borders,
    with squash from the image made square, so that training sees the shapes that evaluation sees.
    """
    drawn_area, drawn_aspect, drawn_x, drawn_y = draws.tolist()
    longest = max(width, height)
    canvas_width, canvas_height = (longest, longest) if resize == "pad" else (width, height)
    share = area[0] + (area[1] - area[0]) * drawn_area
    ratio = math.exp((2.0 * drawn_aspect - 1.0) * math.log(aspect))
    if resize == "squash":
        ratio *= width / height
    target = share * canvas_width * canvas_height
    box_width = min(canvas_width, max(1, round(math.sqrt(target * ratio))))
    box_height = min(canvas_height, max(1, round(math.sqrt(target / ratio))))
    left = int(drawn_x * (canvas_width - box_width + 1)) - (canvas_width - width) // 2
    top = int(drawn_y * (canvas_height - box_height + 1)) - (canvas_height - height) // 2
    return _inside(left, top, box_width, box_height, width, height, side)


def _inside(left: int, top: int, box_width: int, box_height: int, width: int, height: int, side: int) -> Placement:
    """The part of the box that lies in the image, and where it goes when the whole box fills the square."""
    x0, x1 = (min(max(x, 0), width) for x in (left, left + box_width))
    y0, y1 = (min(max(y, 0), height) for y in (top, top + box_height))
    if x1 <= x0 or y1 <= y0:  # nothing but white border: one pixel, laid outside
        return Placement((0, 0, 1, 1), (1, 1), (side, side))
    ox, oy = round((x0 - left) * side / box_width), round((y0 - top) * side / box_height)
    size = (max(1, round((x1 - x0) * side / box_width)), max(1, round((y1 - y0) * side / box_height)))
    return Placement((x0, y0, x1, y1), size, (ox, oy))


def snap(placement: Placement, width: int, height: int) -> tuple[Placement, int]:
    """Move a box by less than a pixel of the image scaled down, so that it is whole pixels there.  -> placement, factor

    width, height: of the image. The factor is the largest that leaves the resolution of the square; 1 changes nothing.
    """
    for factor in FACTORS:
        if factor * min(placement.size) > max(width, height):
            continue
        x0, x1 = _whole_pixels(placement.box[0], placement.box[2], width, factor)
        y0, y1 = _whole_pixels(placement.box[1], placement.box[3], height, factor)
        if x1 - x0 >= factor * placement.size[0] and y1 - y0 >= factor * placement.size[1]:
            return placement._replace(box=(x0, y0, x1, y1)), factor
    return placement, 1


def never_snaps(width: int, height: int, side: int, resize: str) -> bool:
    """Whether `snap` leaves every random crop of such an image as it is, at factor 1."""
    return resize != "pad" and max(width, height) < FACTORS[-1] * side  # parts of what is padded may be smaller than the square


def _whole_pixels(start: int, stop: int, extent: int, factor: int) -> tuple[int, int]:
    """The nearest multiples of `factor`; what the last whole one of them leaves of the image is cut off."""
    last = extent // factor
    return min((start + factor // 2) // factor, last) * factor, min((stop + factor // 2) // factor, last) * factor


def shrink(placement: Placement, factor: int) -> Placement:
    """The same in an image scaled down by a factor that divides the box."""
    left, top, right, bottom = (edge // factor for edge in placement.box)
    return placement._replace(box=(left, top, right, bottom))


def place(pixels: Pixels, placement: Placement, side: int, out: Tensor | None = None) -> Tensor:
    """Resize as Pillow's antialiased bilinear does, to within two grey levels.  [H, W, 3] -> uint8 [3, S, S], channels last

    With `out`, such a tensor, the result is written there.
    """
    x0, y0, x1, y1 = placement.box
    # A batch of one before the channels move: only so are its strides those of channels_last, which is resized as it lies.
    part = torch.from_numpy(np.ascontiguousarray(pixels[y0:y1, x0:x1]))[None].permute(0, 3, 1, 2)
    width, height = placement.size
    fills = placement.size == (side, side) and placement.offset == (0, 0)
    if out is None:
        out = torch.empty((side, side, 3), dtype=torch.uint8).permute(2, 0, 1)
    if (y1 - y0, x1 - x0) != (height, width):
        if fills:
            # What F.interpolate calls, which has no `out`: a copy saved, a fiftieth of the work of an image.
            torch._C._nn._upsample_bilinear2d_aa(part, (side, side), False, None, None, out=out[None])  # type: ignore[call-arg]
            return out
        part = F.interpolate(part, (height, width), mode="bilinear", antialias=True, align_corners=False)
    if fills:
        return out.copy_(part[0])
    out.fill_(WHITE)
    ox, oy = placement.offset
    left, top, right, bottom = max(ox, 0), max(oy, 0), min(ox + width, side), min(oy + height, side)
    if right > left and bottom > top:
        out[:, top:bottom, left:right] = part[0, :, top - oy : bottom - oy, left - ox : right - ox]
    return out
