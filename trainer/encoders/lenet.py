"""The small network of the classic siamese systems: two 5x5 convolutions, fully connected layers, no norm."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from configs.section import Dim
from trainer.objective import unit

LUMA = (0.299, 0.587, 0.114)  # of R, G, B (ITU-R BT.601)
LARGEST = 2**28  # weights
Width = Annotated[int, Field(ge=1, le=2**14)]


class LeNet(nn.Module):
    """Twice a 5x5 convolution, activation and 2x2 max pooling, then fully connected layers down to `dim` (LeCun et al. 1998).

    `widths`: channels of the two convolutions; `hidden`: sizes of the layers before the last. The defaults are the embedding
    net of siamese-triplet; Caffe's siamese example has widths [20, 50], hidden [500, 10], and one relu: `activate: once`, after
    the first hidden layer and nowhere else. `raw`: vectors as they come, compared by euclidean distance; false: unit length.
    `grey`: one input channel, the luma, instead of RGB.
    """

    def __init__(
        self,
        image_size: int,
        dim: Dim = 2,
        widths: Annotated[Sequence[Width], Field(min_length=2, max_length=2)] = (32, 64),
        hidden: Annotated[Sequence[Width], Field(max_length=8)] = (256, 256),
        activation: Literal["prelu", "relu"] = "prelu",
        activate: Literal["every", "once"] = "every",
        raw: bool = True,
        grey: bool = True,
    ) -> None:
        super().__init__()
        self.image_size, self.dim, self.raw, self.grey = image_size, dim, raw, grey
        side = ((image_size - 4) // 2 - 4) // 2
        sizes = [widths[1] * max(0, side) ** 2, *hidden, dim]
        _check(image_size, side, sizes)
        kind = nn.PReLU if activation == "prelu" else nn.ReLU
        first, second = nn.Conv2d(1 if grey else 3, widths[0], 5), nn.Conv2d(widths[0], widths[1], 5)
        inner = kind if activate == "every" else nn.Identity
        self.body = nn.Sequential(first, inner(), nn.MaxPool2d(2), second, inner(), nn.MaxPool2d(2))
        layers: list[nn.Module] = []
        for i in range(len(hidden)):
            layers += [nn.Linear(sizes[i], sizes[i + 1]), kind() if i == 0 else inner()]
        self.head = nn.Sequential(*layers, nn.Linear(sizes[-2], dim))
        self.stages = [["body.0", "body.1"], ["body.3", "body.4"], *([f"head.{2 * i}"] for i in range(len(hidden)))]
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, images: Tensor) -> Tensor:
        """Float images [n, 3, S, S] in [0, 1] to vectors [n, dim]."""
        red, green, blue = torch.split(images, 1, dim=1)
        # Numbers, not a buffer: DistributedDataParallel cannot broadcast one of this shape with channels last.
        pixels = LUMA[0] * red + LUMA[1] * green + LUMA[2] * blue if self.grey else images
        features = self.body(((pixels - 0.5) / 0.5).contiguous(memory_format=torch.channels_last))
        vectors: Tensor = self.head(features.flatten(1))
        return vectors if self.raw else unit(vectors)


def _check(image_size: int, side: int, sizes: Sequence[int]) -> None:
    if side < 1:
        raise ValueError(
            f"data.image_size {image_size}: nothing is left of the image after two 5x5 convolutions and poolings; "
            "encoder lenet takes images of 16 pixels or more (28 or 32 are usual)"
        )
    weights = sum(a * b for a, b in pairwise(sizes))
    if weights > LARGEST:
        raise ValueError(
            f"encoder.widths, encoder.hidden: images of {image_size} pixels (data.image_size) make {weights / 1e6:.0f} M "
            f"weights, more than the {LARGEST / 1e6:.0f} M that this small network may have; lower them"
        )
