"""Euclidean distance as a dot product, so that raw vectors are searched and ranked by the code that searches by cosine."""

from __future__ import annotations

import torch
from torch import Tensor

from trainer.pairs import Pairs


def lifted(queries: Tensor, gallery: Tensor) -> tuple[Tensor, Tensor]:
    """Float64 [Q, D + 2] and [G, D + 2], whose dot products are minus the squared distances of queries [Q, D] and gallery
    [G, D].

    [2q, -|q|^2, -1] and [g, 1, |g|^2] cancel where vectors lie far from the origin, so what is common to all is taken away
    first: a centre of 8 bits, which leaves the differences of float32 numbers exact.
    """
    centre = gallery.double().mean(0).bfloat16().double() if len(gallery) else gallery.double().sum(0)
    q, g = queries.double() - centre, gallery.double() - centre
    one = q.new_ones(())
    left = torch.cat([2 * q, -(q * q).sum(1, keepdim=True), -one.expand(len(q), 1)], dim=1)
    right = torch.cat([g, one.expand(len(g), 1), (g * g).sum(1, keepdim=True)], dim=1)
    return left, right


def minus_distance(score: Tensor) -> Tensor:
    """Of minus the squared distances, which may be a hair above 0."""
    return -(-score).clamp(min=0).sqrt()


def by_distance(pairs: Pairs) -> Pairs:
    """Pairs scored with minus the squared distance, scored with minus the distance."""
    return Pairs(minus_distance(pairs.same), minus_distance(pairs.different), pairs.num_same, pairs.num_different)


def as_distances(values: dict[str, float]) -> dict[str, float]:
    """Metrics of such pairs; their thresholds are distances, up to which two images count as the same."""
    return {name: -value if name.startswith("threshold_") else value for name, value in values.items()}
