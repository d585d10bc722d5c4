"""Random changes of training images: the numbers behind them, and the changes themselves, batched on the device.

Nothing here has a random state. What happens to an image is a function of its draws, and these of (seed, epoch, uid,
record, view); no image's result depends on the others in its batch.
"""

from __future__ import annotations

import math
from enum import IntEnum

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from configs.schema import Augment
from pipelines.batch import NUM_DRAWS
from pipelines.geometry import Placement, random_crop, whole
from pipelines.hashing import Int64s, hash_ints, stream

_TAG_DRAWS = 21
_LUMA = (299, 587, 114)  # thousandths (Rec. 601)
_BLUR_SIDE = 224  # the height of image that `blur_sigma` is meant for
_BLUR_REACH = 3.0  # standard deviations: 0.3 % of the Gaussian lie beyond
_ERASED_AREA, _ERASED_ASPECT, _ERASED_TO = (0.02, 0.25), 3.0, 0.5


class Draw(IntEnum):
    """Which of an image's random numbers is for what. Never renumber: it changes every run."""

    CROP_AREA = 0
    CROP_ASPECT = 1
    CROP_X = 2
    CROP_Y = 3
    FLIP = 4
    BRIGHTNESS = 5
    CONTRAST = 6
    SATURATION = 7
    HUE = 8
    GRAYSCALE = 9
    ROTATE = 10
    SCALE = 11
    SHIFT_X = 12
    SHIFT_Y = 13
    ERASE = 14
    ERASE_AREA = 15
    ERASE_ASPECT = 16
    ERASE_X = 17
    ERASE_Y = 18
    BLUR = 19
    BLUR_SIGMA = 20


def draws(seed: int, epoch: Int64s, uid: Int64s, row: Int64s, view: Int64s) -> NDArray[np.float32]:
    """Uniform numbers in [0, 1) for n images.  [n] each -> [n, NUM_DRAWS]"""
    key = hash_ints(seed, _TAG_DRAWS, epoch, uid, row, view)
    return (stream(key, NUM_DRAWS) >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-24)


def crop_box(drawn: NDArray[np.float32], width: int, height: int, side: int, resize: str, config: Augment) -> Placement:
    """What part of an image of width x height to see: a random crop, or without `crop` the geometry of evaluation.

    drawn: [NUM_DRAWS]
    """
    if config.crop is None:
        return whole(width, height, side, resize)
    return random_crop(drawn[Draw.CROP_AREA : Draw.CROP_Y + 1], width, height, side, resize, config.crop, config.aspect)


def apply(images: Tensor, drawn: Tensor, config: Augment, dtype: torch.dtype = torch.float32) -> Tensor:
    """Flip, colours, rotation with zoom and shift, blur, erasing.  [n, NUM_DRAWS] -> dtype [n, 3, H, W] in [0, 1]

    images: uint8 [n, 3, H, W]. Everything that is off in the config leaves the values exactly as they are.
    """
    images, drawn = images.contiguous(), drawn.to(dtype)  # an encoder's sums round otherwise with channels last
    if config.flip > 0.0:
        flip = drawn[:, Draw.FLIP] < config.flip
        images = torch.where(flip[:, None, None, None], images.flip(-1), images)
    pixels = images.to(dtype) / 255
    if config.color > 0.0 or config.hue > 0.0 or config.grayscale > 0.0:
        pixels = _recolor(pixels, _mean_luma(images, dtype), drawn, config)
    if config.rotate > 0.0 or config.scale > 0.0 or config.shift > 0.0:
        pixels = _move(pixels, drawn, config)
    if config.blur > 0.0:
        pixels = _blur(pixels, drawn, config)
    if config.erase > 0.0:
        pixels = _erase(pixels, drawn, config)
    return pixels


def _mean_luma(images: Tensor, dtype: torch.dtype) -> Tensor:
    """Mean brightness of each image, from exact integer sums: the same whatever the batch and the device.  -> [n]"""
    sums = images.sum(dim=(2, 3), dtype=torch.int64)  # [n, 3]
    luma = sum(weight * sums[:, channel] for channel, weight in enumerate(_LUMA))
    assert isinstance(luma, Tensor)
    return (luma.to(torch.float64) / (255_000 * images.shape[2] * images.shape[3])).to(dtype)


def _recolor(pixels: Tensor, mean: Tensor, drawn: Tensor, config: Augment) -> Tensor:
    """Hue, saturation, then brightness and contrast about the image's mean; [0, 1] is enforced once, at the end."""
    if config.hue > 0.0:
        pixels = _turn_hue(pixels, config.hue * _signed(drawn[:, Draw.HUE]))
    if config.color == 0.0 and config.grayscale == 0.0:
        return pixels.clamp(0, 1)
    brightness = 1 + config.color * _signed(drawn[:, Draw.BRIGHTNESS])  # [n] each
    contrast = 1 + config.color * _signed(drawn[:, Draw.CONTRAST])
    saturation = 1 + config.color * _signed(drawn[:, Draw.SATURATION])
    saturation = torch.where(drawn[:, Draw.GRAYSCALE] < config.grayscale, torch.zeros_like(saturation), saturation)
    red, green, blue = pixels.unbind(1)
    luma = ((_LUMA[0] * red + _LUMA[1] * green + _LUMA[2] * blue) / 1000)[:, None]  # [n, 1, H, W]
    gain, lift = brightness * contrast, brightness * (1 - contrast) * mean
    return (_wide(gain * saturation) * pixels + _wide(gain * (1 - saturation)) * luma + _wide(lift)).clamp(0, 1)


def _turn_hue(pixels: Tensor, turns: Tensor) -> Tensor:
    """Turn the colours about the grey axis (Rodrigues): a third of a turn takes red to green to blue.  turns [n]"""
    # Angles in float64, so that their cosines round to the same value in vectorised and in plain loops.
    angle = 2 * math.pi * turns.to(torch.float64)
    across, aside = (1 - torch.cos(angle)) / 3, torch.sin(angle) / math.sqrt(3)
    stay, ahead, behind = (_wide(part.to(pixels.dtype)) for part in (1 - 2 * across, across + aside, across - aside))
    # Channel c receives `ahead` of the channel before it and `behind` of the one after it.
    return stay * pixels + ahead * pixels.roll(1, dims=1) + behind * pixels.roll(-1, dims=1)


def _move(pixels: Tensor, drawn: Tensor, config: Augment) -> Tensor:
    """Rotate, zoom and shift about the centre in one bilinear sampling, white outside."""
    height, width = pixels.shape[2:]
    angle = math.radians(config.rotate) * _signed(drawn[:, Draw.ROTATE]).to(torch.float64)
    zoom = 1 + config.scale * _signed(drawn[:, Draw.SCALE]).to(torch.float64)
    cos, sin = (_wide((part(angle) / zoom).to(pixels.dtype))[:, 0] for part in (torch.cos, torch.sin))  # [n, 1, 1]
    shift_x, shift_y = (2 * config.shift * _signed(drawn[:, i])[:, None, None] for i in (Draw.SHIFT_X, Draw.SHIFT_Y))
    # Pixel centres from -1 to 1, x in units of the height, so that a rotation of an oblong image is one.
    x = _centres(width, pixels)[None, None, :] - shift_x
    y = _centres(height, pixels)[None, :, None] - shift_y
    x = x * (width / height)
    grid = torch.stack([(cos * x + sin * y) * (height / width), cos * y - sin * x], dim=-1)  # [n, H, W, 2]
    dark = F.grid_sample(1 - pixels, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    return (1 - dark).clamp(0, 1)


def _blur(pixels: Tensor, drawn: Tensor, config: Augment) -> Tensor:
    """Blur some images with a Gaussian, each with its own sigma; the border's pixels go on outside."""
    least, most = (sigma * pixels.shape[2] / _BLUR_SIDE for sigma in config.blur_sigma)
    reach = math.ceil(_BLUR_REACH * most)
    sigma = least + (most - least) * drawn[:, Draw.BLUR_SIGMA].to(torch.float64)
    steps = torch.arange(reach + 1, device=pixels.device, dtype=torch.float64)
    weights = torch.exp(-0.5 * (steps / sigma[:, None]) ** 2)  # [n, reach + 1], of one side
    weights = (weights / (2 * weights.sum(1, keepdim=True) - 1)).to(pixels.dtype)
    blurred = _convolve(_convolve(pixels, weights, 2), weights, 3)
    return torch.where(_wide(drawn[:, Draw.BLUR] < config.blur), blurred.clamp(0, 1), pixels)


def _convolve(pixels: Tensor, weights: Tensor, dim: int) -> Tensor:
    """Weigh each pixel's neighbours along dimension 2 or 3, each image its own way.  weights: [n, reach + 1], of one side

    Sums of shifted images: unlike the kernels of conv2d they round alike whatever the batch.
    """
    reach, extent = weights.shape[1] - 1, pixels.shape[dim]
    padded = F.pad(pixels, (0, 0, reach, reach) if dim == 2 else (reach, reach, 0, 0), mode="replicate")
    total = _wide(weights[:, 0]) * pixels
    for step in range(1, reach + 1):
        both = padded.narrow(dim, reach - step, extent) + padded.narrow(dim, reach + step, extent)
        total += both.mul_(_wide(weights[:, step]))
    return total


def _erase(pixels: Tensor, drawn: Tensor, config: Augment) -> Tensor:
    """Paint a grey rectangle somewhere (Zhong et al. 2017, random erasing)."""
    height, width = pixels.shape[2:]
    area = _ERASED_AREA[0] + (_ERASED_AREA[1] - _ERASED_AREA[0]) * drawn[:, Draw.ERASE_AREA]
    ratio = torch.exp(_signed(drawn[:, Draw.ERASE_ASPECT]).to(torch.float64) * math.log(_ERASED_ASPECT))
    across = torch.sqrt(area * ratio).to(pixels.dtype).clamp(max=1)  # shares of width and height
    down = torch.sqrt(area / ratio).to(pixels.dtype).clamp(max=1)
    left, top = drawn[:, Draw.ERASE_X] * (1 - across), drawn[:, Draw.ERASE_Y] * (1 - down)
    x = (_centres(width, pixels) / 2 + 0.5)[None, :]
    y = (_centres(height, pixels) / 2 + 0.5)[None, :]
    columns = (x >= left[:, None]) & (x < (left + across)[:, None])  # [n, W]
    rows = (y >= top[:, None]) & (y < (top + down)[:, None])  # [n, H]
    erased = (drawn[:, Draw.ERASE] < config.erase)[:, None, None] & rows[:, :, None] & columns[:, None, :]
    return torch.where(erased[:, None], torch.full_like(pixels, _ERASED_TO), pixels)


def _signed(draw: Tensor) -> Tensor:
    """[0, 1) -> [-1, 1)"""
    return 2 * draw - 1


def _wide(value: Tensor) -> Tensor:
    """[n] -> [n, 1, 1, 1]"""
    return value[:, None, None, None]


def _centres(length: int, like: Tensor) -> Tensor:
    """Pixel centres of a side that goes from -1 to 1.  [length]"""
    return (2 * torch.arange(length, device=like.device, dtype=like.dtype) + 1) / length - 1
