"""The multi-scale network of Deep Ranking (Wang et al. 2014, figure 3): a deep path and shallow ones on a smaller image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from configs.section import Dim
from trainer.encoders.convnet import LARGEST, Blocks, ConvNet, Dropout, Side, Widths, centred
from trainer.objective import unit

STRIDE = 4  # the paper's; the kernel is twice as long


class MultiScale(nn.Module):
    """A `ConvNet` for what an image shows, and two single convolutions for how it looks as a whole; unit length.

    The shallow paths see means of 4 x 4 and 8 x 8 pixels (`subsample`): a convolution, GELU, and the maxima of overlapping
    windows, `shallow_grid` x `shallow_grid` of them. Each path at unit length; the shallow ones are joined and mapped to `dim`,
    then joined with the deep one and mapped to `dim` again, both linear.
    The convolution is 8x8 with stride 4, as in the paper: at 224 pixels 15 and 8 positions a side, 4 after the maxima. Smaller
    images halve stride and kernel until a map has `shallow_grid` positions a side: at 48 pixels 8x8 and 4x4, at 32 pixels 4x4
    and 2x2.
    `shallow_width`: channels of a shallow path (the paper has 96); the other options are those of ConvNet, for the deep path.
    """

    def __init__(
        self,
        image_size: int,
        dim: Dim = 128,
        patch: Side = 4,
        widths: Widths = (64, 128),
        blocks: Blocks = 2,
        grid: Side = 3,
        dropout: Dropout = 0.0,
        checkpointing: bool = False,
        subsample: Annotated[Sequence[Side], Field(min_length=1, max_length=8)] = (4, 8),
        shallow_width: Annotated[int, Field(ge=1, le=4096)] = 32,
        shallow_grid: Annotated[int, Field(ge=1, le=64)] = 4,
    ) -> None:
        super().__init__()
        self.image_size, self.dim = image_size, dim
        _check(dim, subsample, shallow_width, shallow_grid)
        self.deep = ConvNet(image_size, dim, patch, widths, blocks, grid, dropout, checkpointing)
        self.shallow = nn.ModuleList(Shallow(image_size, factor, shallow_width, shallow_grid) for factor in subsample)
        self.looks = nn.Linear(len(subsample) * shallow_width * shallow_grid**2, dim, bias=False)
        self.head = nn.Linear(2 * dim, dim, bias=False)
        first, *rest = [[f"deep.{name}" for name in stage] for stage in self.deep.stages]
        self.stages = [[*first, "shallow"], *rest]
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, images: Tensor) -> Tensor:
        """Float images [n, 3, S, S] in [0, 1] to unit vectors [n, dim]."""
        pixels = centred(images)
        shallow = self.looks(torch.cat([path(pixels) for path in self.shallow], dim=1))
        return unit(self.head(torch.cat([self.deep(images), unit(shallow)], dim=1)))


class Shallow(nn.Module):
    """One convolution over an image made `factor` times smaller, its maxima over overlapping windows, unit length."""

    def __init__(self, image_size: int, factor: int, width: int, grid: int) -> None:
        super().__init__()
        self.factor, self.grid = factor, grid
        side = image_size // factor
        stride = next((s for s in (STRIDE, STRIDE // 2, 1) if side >= 1 and side // s + 1 >= grid), None)
        if stride is None:
            raise ValueError(
                f"encoder.shallow_grid: images of {image_size} pixels (data.image_size), {factor} times smaller "
                f"(encoder.subsample), have {side} pixels a side, too few for {grid} x {grid} positions; lower one of the "
                "two, or use larger images"
            )
        self.conv = nn.Conv2d(3, width, 2 * stride, stride=stride, padding=stride)

    def forward(self, pixels: Tensor) -> Tensor:
        """[n, 3, S, S] -> [n, width * grid * grid]"""
        features = F.gelu(self.conv(F.avg_pool2d(pixels, self.factor)))
        return unit(maxima(maxima(features, self.grid).mT, self.grid).mT.flatten(1))


def maxima(x: Tensor, count: int) -> Tensor:
    """Maxima over `count` overlapping windows along the second last axis.  [n, C, H, W] -> [n, C, count, W]

    Not F.max_pool2d: its backward adds in no fixed order on GPUs where windows overlap.
    """
    return torch.stack([x[:, :, first:last].amax(2) for first, last in windows(x.shape[2], count)], dim=2)


def windows(side: int, count: int) -> list[tuple[int, int]]:
    """First and one past the last position of each window: 2 step - 1 wide, at 224 pixels 7 every 4 and 3 every 2.

    Where so many steps do not fit (5 positions, 4 windows), those of adaptive pooling.
    """
    step = -(-side // count)
    starts = [i * step - step // 2 for i in range(count)]
    if starts[-1] >= side:
        return [(i * side // count, -(-(i + 1) * side // count)) for i in range(count)]
    return [(max(start, 0), min(start + 2 * step - 1, side)) for start in starts]


def _check(dim: int, subsample: Sequence[int], width: int, grid: int) -> None:
    weights = dim * (len(subsample) * width * grid * grid + 2 * dim)
    if weights > LARGEST:
        raise ValueError(
            f"encoder.shallow_width: {width}, encoder.shallow_grid {grid} and encoder.dim {dim} make {weights / 1e6:.0f} M "
            f"weights, more than the {LARGEST / 1e6:.0f} M that the linear maps may have; lower them"
        )
