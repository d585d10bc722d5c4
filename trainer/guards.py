"""Guards drop candidates that are probably no negatives, before any mining."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.rows import Rows


@dataclass(frozen=True, slots=True)
class Guards:
    """Thresholds, each off when None. Called with a chunk of rows, it narrows its negatives.

    `ignore_above`: a negative more similar than this. `ignore_above_ratio`: a negative more similar than this share of the
    query's most similar positive (positive-aware, de Souza P. Moreira et al. 2024). `ignore_closer_than`: a negative whose
    `target` is within this cosine distance of the query's: its text says the same.
    """

    ignore_above: float | None = None
    ignore_above_ratio: float | None = None
    ignore_closer_than: float | None = None

    @property
    def on(self) -> bool:
        return any(t is not None for t in (self.ignore_above, self.ignore_above_ratio, self.ignore_closer_than))

    def __call__(self, rows: Rows, query_target: Tensor | None, candidate_target: Tensor | None) -> None:
        """`query_target` [q, E] and `candidate_target` [G, E] are unit vectors."""
        if self.ignore_above is not None:
            rows.drop(rows.similarity > self.ignore_above)
        if self.ignore_above_ratio is not None:
            near = rows.similarity.gather(1, rows.positives).masked_fill(~rows.is_positive, -torch.inf)
            best = near.amax(1, keepdim=True)
            # A query without positives has nothing to compare with: nothing is dropped.
            rows.drop((rows.similarity > self.ignore_above_ratio * best) & (best > -torch.inf))
        if self.ignore_closer_than is not None:
            if query_target is None or candidate_target is None:
                raise ValueError(
                    "ignore_closer_than needs `target`, the vectors in which candidates are compared: pack records with a "
                    "column `target` (tables) or with `<key>.target.npy` (tars), or give `target` to the objective"
                )
            rows.drop(1 - query_target @ candidate_target.T < self.ignore_closer_than)
