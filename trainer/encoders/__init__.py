"""Encoders: float images [n, 3, S, S] in [0, 1] to vectors [n, dim], of unit length unless the encoder is `raw`."""

from __future__ import annotations

import re

from torch import nn

from configs.registry import build, resolve
from configs.schema import Encoder, Tower
from trainer.encoders.freeze import freeze, freeze_batchnorm
from trainer.encoders.towers import Towers, takes_vectors


def build_encoder(part: Encoder, image_size: int) -> nn.Module:
    """The encoder for a config's `encoder` section, frozen where that says so; it has attributes `dim` and `image_size`.

    It may have `stages` (see `stages_of`), `undecayed` (names of weights without decay), `about` (facts for the model card)
    and `raw`, true where its vectors have any length and are compared by euclidean distance.
    Raises ValueError for an unknown name or option.
    """
    if part.anchor is not None and part.positive is not None:
        return Towers(_side("anchor", part.anchor, image_size), _side("positive", part.positive, image_size))
    if takes_vectors(resolve("encoder", part.name)):
        raise ValueError(f"encoder.name: {part.name!r} encodes vectors; name it in encoder.positive, beside an encoder.anchor")
    return _network(part, image_size)


def _side(side: str, part: Tower, image_size: int) -> nn.Module:
    """One of two towers; its settings are told with the tower's name."""
    try:
        return _network(part, image_size)
    except ValueError as error:
        raise ValueError(re.sub(r"\bencoder\.(?!anchor|positive)", f"encoder.{side}.", str(error))) from error


def _network(part: Tower, image_size: int) -> nn.Module:
    encoder: nn.Module = build("encoder", part, nn.Module, image_size=image_size)
    if not isinstance(getattr(encoder, "dim", None), int):
        raise ValueError(f"encoder.name: {part.name!r} has no attribute `dim`, the length of its vectors; give it one")
    if part.freeze:
        freeze(encoder, part.freeze)
    if part.freeze_batchnorm:
        freeze_batchnorm(encoder)
    return encoder


def is_raw(encoder: object) -> bool:
    """Whether its vectors are compared by euclidean distance, not by their cosine."""
    return getattr(getattr(encoder, "__self__", encoder), "raw", False) is True  # or of the module whose method it is
