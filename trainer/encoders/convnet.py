"""A small residual network for small images, trained from nothing."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from trainer.objective import unit


class ConvNet(nn.Module):
    """Residual stages of 3x3 convolutions with GroupNorm, mean pooling, a linear head and unit length.

    GroupNorm, not BatchNorm: what an image becomes must not depend on the batch it is in.
    `widths`: channels of each stage, each after the first at half the resolution; `blocks`: residual blocks a stage;
    `dropout`: before the head.
    """

    def __init__(
        self,
        image_size: int,
        dim: int = 128,
        widths: Sequence[int] = (64, 128, 256),
        blocks: int = 1,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.image_size, self.dim = image_size, dim
        layers: list[nn.Module] = [nn.Conv2d(3, widths[0], 3, stride=2, padding=1, bias=False), _norm(widths[0]), nn.ReLU()]
        for before, after in zip([widths[0], *widths], widths, strict=False):
            if before != after:
                layers += [nn.Conv2d(before, after, 3, stride=2, padding=1, bias=False), _norm(after), nn.ReLU()]
            layers += [Block(after) for _ in range(blocks)]
        self.body = nn.Sequential(*layers)
        self.head = nn.Sequential(nn.Dropout(dropout), nn.Linear(widths[-1], dim))
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, images: Tensor) -> Tensor:
        """Float images [n, 3, S, S] in [0, 1] to unit vectors [n, dim]."""
        x = (images - 0.5) / 0.25
        x = self.body(x.contiguous(memory_format=torch.channels_last))  # [n, C, s, s]
        return unit(self.head(x.mean((2, 3))))


class Block(nn.Module):
    """x + f(x), f two 3x3 convolutions; starts as the identity."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1, bias=False), _norm(width), nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1, bias=False), _norm(width),
        )  # fmt: skip
        last = self.body[-1]
        assert isinstance(last, nn.GroupNorm)
        nn.init.zeros_(last.weight)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = torch.relu(x + self.body(x))
        return result


def _norm(width: int) -> nn.GroupNorm:
    return nn.GroupNorm(max(1, width // 16), width)
