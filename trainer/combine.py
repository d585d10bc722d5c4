"""Objectives made of objectives: weighted sums, and the same loss on prefixes of the vectors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from trainer.family import Stats


class Weighted(nn.Module):
    """sum_i weight_i * objective_i; statistics are named `<name>/<statistic>`."""

    def __init__(self, objectives: Mapping[str, nn.Module], weights: Sequence[float]) -> None:
        super().__init__()
        self.parts = nn.ModuleDict(objectives)
        self.weights = tuple(weights)

    def forward(self, vectors: Tensor, group: Tensor, **rest: Any) -> tuple[Tensor, Stats]:
        total, stats = vectors.new_zeros(()), Stats()
        for (name, part), weight in zip(self.parts.items(), self.weights, strict=True):
            value, found = part(vectors, group, **rest)
            total = total + weight * value
            stats |= {f"{name}/loss": value.detach(), **{f"{name}/{key}": number for key, number in found.items()}}
        return total, stats


class Prefixes(nn.Module):
    """The sum of one objective over the first d numbers of the vectors, for each d (Kusupati et al. 2022, Matryoshka).

    With a normalising objective each prefix is scaled to unit length anew. Statistics are those of the longest.
    """

    def __init__(self, objective: nn.Module, dims: Sequence[int]) -> None:
        super().__init__()
        if not dims or min(dims) < 1 or len(set(dims)) != len(dims):
            raise ValueError(f"loss.matryoshka: a list of different lengths above 0, got {list(dims)}")
        self.objective = objective
        self.dims = tuple(sorted(dims))

    def forward(self, vectors: Tensor, group: Tensor, *, keys: Tensor | None = None, **rest: Any) -> tuple[Tensor, Stats]:
        if self.dims[-1] > vectors.shape[1]:
            raise ValueError(f"loss.matryoshka: {self.dims[-1]} is more than the {vectors.shape[1]} numbers of a vector")
        total, stats = vectors.new_zeros(()), Stats()
        for dim in self.dims:
            part = None if keys is None else keys[:, :dim]
            value, stats = self.objective(vectors[:, :dim], group, keys=part, **rest)
            total = total + value
        return total, stats
