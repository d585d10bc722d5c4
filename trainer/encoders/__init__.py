"""Encoders: float images [n, 3, S, S] in [0, 1] to unit vectors [n, dim]."""

from __future__ import annotations

from torch import nn

from configs.registry import build
from configs.schema import Part


def build_encoder(part: Part, image_size: int) -> nn.Module:
    """The encoder for a config's `encoder` section; it has attributes `dim` and `image_size`.

    Raises ValueError for an unknown name or option.
    """
    encoder: nn.Module = build("encoder", part, image_size=image_size)
    return encoder
