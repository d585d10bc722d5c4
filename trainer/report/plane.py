"""Embeddings on a plane, and what is shown there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

MOST = 5000  # points that UMAP lays out
PICTURES = 84  # of the map, in whole groups
LEAST_SPACE = 0.08  # between the middles of two groups' first pictures, as a share of the plane's side


@dataclass(frozen=True, slots=True)
class Plane:
    """Points [N, 2] in the unit square, and how they came there, for a person."""

    points: Tensor
    method: str


def lay_out(vectors: Tensor) -> Plane:
    """The two main directions of vectors [N, D] (PCA), or UMAP's plane where umap-learn is installed."""
    umap = _umap() if 15 < len(vectors) <= MOST else None
    if umap is not None:
        points = torch.from_numpy(umap(metric="cosine", random_state=0, n_jobs=1).fit_transform(vectors.numpy()))
        return Plane(_unit_square(points), "UMAP")
    centred = (vectors - vectors.mean(0)).double()
    values, axes = torch.linalg.eigh(centred.T @ centred)  # rising
    axes = axes[:, -2:].flip(1)
    axes = axes * axes.gather(0, axes.abs().argmax(0, keepdim=True)).sign()  # a direction and its opposite are the same axis
    share = float(values[-2:].sum() / values.sum().clamp(min=1e-12))
    points = centred @ axes
    points = torch.nn.functional.pad(points, (0, 2 - points.shape[1]))  # a vector of one number has one direction
    return Plane(_unit_square(points), f"PCA, {share:.0%} of the variance")


def _umap() -> Callable[..., Any] | None:
    try:
        from umap import UMAP  # late: optional, and it takes seconds
    except ImportError:
        return None
    found: Callable[..., Any] = UMAP
    return found


def choose(points: Tensor, group: Tensor, shown: Tensor) -> list[list[int]]:
    """Groups of rows to show as pictures, spread over the plane: first those that lie farthest from all chosen before.

    shown [N]: rows that are pictures. Of a large group, the first few.
    """
    groups, inverse = torch.unique(group, return_inverse=True)
    count = torch.bincount(inverse)
    middles = torch.zeros(len(groups), 2, dtype=points.dtype).index_add_(0, inverse, points) / count[:, None]
    members = [rows[:6] for rows in _rows_of(inverse, shown)]
    distance = (middles - middles.mean(0)).norm(dim=1)
    distance[torch.tensor([not rows for rows in members], dtype=torch.bool)] = -1
    chosen: list[list[int]] = []
    while sum(map(len, chosen)) < PICTURES:
        best = int(distance.argmax())
        if float(distance[best]) < (LEAST_SPACE if chosen else 0):
            break
        chosen.append(members[best])
        away = (middles - middles[best]).norm(dim=1)
        distance = torch.where(distance < 0, distance, away if len(chosen) == 1 else torch.minimum(distance, away))
        distance[best] = -1
    return chosen


def _rows_of(inverse: Tensor, shown: Tensor) -> list[list[int]]:
    rows: list[list[int]] = [[] for _ in range(int(inverse.max()) + 1)]
    for row in shown.nonzero()[:, 0].tolist():
        rows[int(inverse[row])].append(row)
    return rows


def _unit_square(points: Tensor) -> Tensor:
    """Stretched in both directions alike, so that nothing is distorted."""
    low, high = points.min(0).values, points.max(0).values
    scale = float((high - low).max()) or 1.0
    return ((points - (low + high) / 2) / scale + 0.5).float()
