"""The tower for members that are vectors already, such as text embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from pydantic import Field
from torch import Tensor, nn

from configs.section import Dim
from trainer.objective import unit


class Projection(nn.Module):
    """A linear map of given vectors, or a perceptron with GELU, to unit length.

    `hidden`: widths of the layers between, none for a linear map; `dropout`: before the last layer; `input_dim`: numbers of
    a given vector, by default as many as those of the data have. `image_size` is passed over: there are no images.
    """

    takes_vectors = True

    def __init__(
        self,
        image_size: int,
        dim: Dim = 128,
        hidden: Annotated[Sequence[Dim], Field(max_length=16)] = (),
        dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0,
        input_dim: Dim | None = None,
    ) -> None:
        super().__init__()
        if input_dim is None:
            raise ValueError("encoder.input_dim: the data has no vectors (.npy) that tell it; set it, or pack such data")
        self.image_size, self.dim, self.input_dim = image_size, dim, input_dim
        widths, layers = [input_dim, *hidden], list[nn.Module]()
        for i, width in enumerate(hidden):
            layers += [nn.Linear(widths[i], width), nn.GELU()]
        self.body = nn.Sequential(*layers, nn.Dropout(dropout), nn.Linear(widths[-1], dim, bias=False))
        self.stages = [[f"body.{2 * i}"] for i in range(len(hidden))]

    def forward(self, vectors: Tensor) -> Tensor:
        """Float vectors [m, input_dim] to unit vectors [m, dim]."""
        return unit(self.body(vectors))
