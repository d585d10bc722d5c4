"""Two encoders that share no weights: one for anchors, one for what goes with them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from trainer.encoders.stages import stages_of


class Towers(nn.Module):
    """The `anchor` tower for view 0 and for single images; the `positive` tower for all other views, images or vectors.

    Both learn in every forward pass: a tower without a row encodes one empty member and gives nothing of it, so that its
    gradient is exactly 0 and no rank waits for another. Raises ValueError unless both give vectors of one length.
    """

    def __init__(self, anchor: nn.Module, positive: nn.Module) -> None:
        super().__init__()
        self.anchor, self.positive = anchor, positive
        self.dim, self.image_size = int(anchor.dim), int(anchor.image_size)  # type: ignore[arg-type]
        if takes_vectors(anchor):
            raise ValueError("encoder.anchor.name: anchors are images; give the tower for vectors to encoder.positive")
        if self.dim != int(positive.dim):  # type: ignore[arg-type]
            raise ValueError(
                f"encoder.positive.dim is {positive.dim}, but encoder.anchor.dim is {self.dim}: vectors of both are compared, "
                "so make them equal"
            )
        self.raw = bool(getattr(anchor, "raw", False))
        if self.raw != bool(getattr(positive, "raw", False)):
            raise ValueError("encoder.anchor, encoder.positive: raw vectors and unit vectors are not comparable; set raw alike")
        both = [_prefixed("anchor", stages_of(anchor)), _prefixed("positive", stages_of(positive))]
        depth = max(map(len, both))  # the last stage of one is as far from the end as the other's
        self.stages = [a + b for a, b in zip(*([[]] * (depth - len(own)) + own for own in both), strict=True)]
        named = {"anchor": anchor, "positive": positive}
        self.undecayed = [f"{side}.{name}" for side, tower in named.items() for name in getattr(tower, "undecayed", ())]

    def compile(self, *args: Any, **options: Any) -> None:
        """Each tower by itself: which rows go where differs from batch to batch."""
        self.anchor.compile(*args, **options)
        self.positive.compile(*args, **options)

    def forward(self, images: Tensor, *, other: Tensor | None = None, vectors: Tensor | None = None) -> Tensor:
        """Images [k, ...], those where `other` [k] is true by the positive tower, then `vectors` [m, E].  -> [k + m, dim]

        Without `other` all are anchors. Raises ValueError for images or vectors that the positive tower does not take.
        """
        if other is None and vectors is None:
            found: Tensor = self.anchor(images)
            return found
        if takes_vectors(self.positive):
            if other is not None and bool(other.any()):
                raise ValueError("encoder.positive takes vectors, but here are images that are no anchors")
            width = int(self.positive.input_dim)  # type: ignore[arg-type]
            given = images.new_zeros((0, width)) if vectors is None else vectors
            if given.shape[1] != width:
                raise ValueError(f"encoder.positive.input_dim is {width}, but these vectors have {given.shape[1]} numbers")
            return torch.cat([self._rows(self.anchor, images), self._rows(self.positive, given.to(_float(self)))])
        if vectors is not None:
            raise ValueError("encoder.positive takes images, but here are vectors; name: projection takes these")
        assert other is not None
        first, rest = (~other).nonzero()[:, 0], other.nonzero()[:, 0]
        rows = torch.cat([self._rows(self.anchor, images[first]), self._rows(self.positive, images[rest])])
        return rows.new_empty(rows.shape).index_copy(0, torch.cat([first, rest]), rows)

    def _rows(self, tower: nn.Module, given: Tensor) -> Tensor:
        """[n, dim] of given [n, ...], n >= 0."""
        if len(given) or not (self.training or torch.is_grad_enabled()):
            rows: Tensor = tower(given) if len(given) else given.new_zeros((0, self.dim), dtype=_float(self))
            return rows
        empty: Tensor = tower(given.new_zeros((1, *given.shape[1:])))
        return empty[:0]


def takes_vectors(tower: object) -> bool:
    """Whether it encodes vectors, not images."""
    return getattr(tower, "takes_vectors", False) is True


def image_networks(encoder: nn.Module) -> list[nn.Module]:
    """The encoder, or those of its towers that encode images."""
    both = [encoder.anchor, encoder.positive] if isinstance(encoder, Towers) else [encoder]
    return [network for network in both if not takes_vectors(network)]


def _prefixed(side: str, stages: Any) -> list[list[str]]:
    return [[f"{side}.{name}" for name in stage] for stage in stages]


def _float(module: nn.Module) -> torch.dtype:
    return next(module.parameters()).dtype
