"""A small residual network for small images, trained from nothing in minutes on a CPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from configs.section import Dim
from trainer.objective import unit

LARGEST = 2**28  # weights
Side = Annotated[int, Field(ge=1, le=2048)]
Widths = Annotated[Sequence[Annotated[int, Field(le=2**14)]], Field(max_length=16)]
Blocks = Annotated[int, Field(ge=1, le=256)]
Dropout = Annotated[float, Field(ge=0.0, lt=1.0)]


class ConvNet(nn.Module):
    """Patches, residual stages of 3x3 convolutions with GroupNorm, a coarse grid of features, a linear head, and unit length
    unless `raw`.

    GroupNorm, not BatchNorm: what an image becomes must not depend on the batch it is in. Blocks are pre-activation and
    start as the identity (He et al. 2016; Goyal et al. 2017).
    `patch`: side of the square that becomes one position; `widths`: channels of each stage, each after the first at half
    the resolution; `blocks`: residual blocks a stage; `grid`: the last map is averaged to grid x grid positions, which
    keeps where things are (1: plain mean pooling); `dropout`: before the head; `checkpointing`: blocks are computed again in
    backward instead of kept; `raw`: vectors as they come, compared by euclidean distance.
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
        raw: bool = False,
    ) -> None:
        super().__init__()
        self.image_size, self.dim, self.grid, self.raw = image_size, dim, grid, raw
        _check(image_size, dim, patch, widths, blocks, grid)
        stages: list[nn.Module] = [nn.Conv2d(3, widths[0], patch, stride=patch)]
        for i, width in enumerate(widths):
            if i > 0:
                stages += [_norm(widths[i - 1]), nn.Conv2d(widths[i - 1], width, 2, stride=2, bias=False)]
            stages += [Block(width, checkpointing) for _ in range(blocks)]
        self.body = nn.Sequential(*stages, _norm(widths[-1]), nn.GELU())
        self.stages = [[f"body.{i}"] for i in range(len(stages))]
        self.head = nn.Sequential(nn.Dropout(dropout), nn.Linear(widths[-1] * grid * grid, dim, bias=False))
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, images: Tensor) -> Tensor:
        """Float images [n, 3, S, S] in [0, 1] to vectors [n, dim]."""
        features = _pooled(self.body(centred(images)), self.grid)  # [n, C, grid, grid]
        vectors: Tensor = self.head(features.flatten(1))
        return vectors if self.raw else unit(vectors)


class Block(nn.Module):
    """x + f(x), f two 3x3 convolutions, each behind norm and GELU."""

    def __init__(self, width: int, checkpointing: bool = False) -> None:
        super().__init__()
        self.checkpointing = checkpointing
        first, last = (nn.Conv2d(width, width, 3, padding=1, bias=False) for _ in range(2))
        nn.init.zeros_(last.weight)
        self.body = nn.Sequential(_norm(width), nn.GELU(), first, _norm(width), nn.GELU(), last)

    def forward(self, x: Tensor) -> Tensor:
        if self.checkpointing and self.training and torch.is_grad_enabled():
            again: Tensor = checkpoint(self.body, x, use_reentrant=False)
            return x + again
        result: Tensor = x + self.body(x)
        return result


class Norm(nn.GroupNorm):
    """GroupNorm that may follow frozen layers."""

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled() and not x.requires_grad:
            # torch 2.13 on CPUs: its backward crashes on a channels-last input that needs no gradient.
            x = x.detach().requires_grad_()
        return super().forward(x)


def centred(images: Tensor) -> Tensor:
    """Pixels in [0, 1] about 0, channels last."""
    return ((images - 0.7) / 0.35).contiguous(memory_format=torch.channels_last)


def _pooled(features: Tensor, grid: int) -> Tensor:
    """Means over grid x grid areas of [n, C, H, W]."""
    if not torch.are_deterministic_algorithms_enabled():
        return F.adaptive_avg_pool2d(features, grid)
    # Its backward adds in no fixed order on GPUs; two matrix products do.
    down, across = (F.adaptive_avg_pool1d(torch.eye(size).to(features), grid) for size in features.shape[2:])  # [H, grid]
    return down.T @ features.contiguous() @ across


def _norm(width: int) -> nn.GroupNorm:
    return Norm(8, width)


def _check(image_size: int, dim: int, patch: int, widths: Sequence[int], blocks: int, grid: int) -> None:
    for name, value in (("dim", dim), ("patch", patch), ("blocks", blocks), ("grid", grid)):
        if value < 1:
            raise ValueError(f"encoder.{name}: must be at least 1, got {value}")
    if not widths or any(width < 8 or width % 8 for width in widths):
        raise ValueError(f"encoder.widths: one multiple of 8 for each stage, got {list(widths)}")
    weights = sum(18 * width * width * blocks for width in widths) + widths[-1] * grid * grid * dim
    if weights > LARGEST:
        raise ValueError(
            f"encoder.widths: {list(widths)}, encoder.blocks {blocks}, encoder.grid {grid} and encoder.dim {dim} make "
            f"{weights / 1e6:.0f} M weights, more than the {LARGEST / 1e6:.0f} M that this small network may have; lower them"
        )
    smallest = image_size // patch // 2 ** (len(widths) - 1)
    if smallest < grid:
        raise ValueError(
            f"encoder.grid: images of {image_size} pixels (data.image_size) leave {smallest} x {smallest} positions after "
            f"encoder.patch {patch} and {len(widths)} encoder.widths, fewer than grid {grid}; use a smaller patch or grid, or "
            "larger images"
        )
