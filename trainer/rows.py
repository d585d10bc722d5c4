"""A chunk of query rows against all candidates: what a loss sees, and what it answers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

Distance = Literal["euclidean", "squared_euclidean", "cosine"]


@dataclass(frozen=True, slots=True)
class Ids:
    """The integers that travel with the rows of a batch, [n] each; `record` is global, `match` is per row."""

    group: Tensor
    uid: Tensor
    view: Tensor
    record: Tensor
    match: Tensor  # 1, or 0 for the rows of a labelled pair that does not match
    valid: Tensor  # 1 or 0

    def stack(self) -> Tensor:
        return torch.stack([self.group, self.uid, self.view, self.record, self.match, self.valid], dim=1)  # [n, 6]

    @staticmethod
    def unstack(columns: Tensor) -> Ids:
        return Ids(*columns.unbind(1))

    def select(self, rows: Tensor) -> Ids:
        return Ids.unstack(self.stack()[rows])


@dataclass(frozen=True, slots=True)
class Rows:
    """q local queries against G candidates of all ranks, candidates in an order that no rank number enters.

    `similarity` is the dot product of the vectors as used; `*_norms` are squared norms.
    """

    similarity: Tensor  # [q, G]
    query_norms: Tensor  # [q]
    candidate_norms: Tensor  # [G]
    positive: Tensor  # [q, G] bool
    negative: Tensor  # [q, G] bool

    def distance(self, kind: Distance) -> Tensor:
        """Distances [q, G]; the square root is safe at 0 in value and in gradient."""
        if kind == "cosine":
            return 1 - self.similarity
        squared = self.query_norms[:, None] + self.candidate_norms[None, :] - 2 * self.similarity
        return squared.clamp_min(0) if kind == "squared_euclidean" else safe_sqrt(squared)


@dataclass(frozen=True, slots=True)
class Terms:
    """A chunk's share of the loss: the sum of its terms and how many there are, both scalars."""

    total: Tensor
    count: Tensor
    stats: dict[str, Tensor] = field(default_factory=dict)  # name -> [2]: (sum, count), summed over chunks and ranks


def safe_sqrt(x: Tensor) -> Tensor:
    """The square root with value and gradient 0 where x <= 0."""
    positive = x > 0
    return torch.where(positive, x, torch.ones_like(x)).sqrt() * positive


def masks(queries: Ids, candidates: Ids, *, explicit_for_anchors: bool) -> tuple[Tensor, Tensor]:
    """Boolean [q, G]: which candidates are positives and which are negatives of each query.

    Positive: the same group, and another image or another view of the same record. Negative: another group. The
    partner in a labelled pair that does not match, and a record's own explicit negatives (views 2..), are negatives
    whatever their group. An image is never its own negative. Invalid rows are nobody's. With `explicit_for_anchors`
    explicit negatives are candidates of anchors (view 0) only.
    """
    q, c = queries, candidates
    both_valid = (q.valid[:, None] & c.valid[None, :]).bool()
    same_group = q.group[:, None] == c.group[None, :]
    same_image = q.uid[:, None] == c.uid[None, :]
    other_view = q.view[:, None] != c.view[None, :]
    own = (q.record[:, None] == c.record[None, :]) & other_view
    explicit = (c.view >= 2)[None, :]
    is_anchor = (q.view == 0)[:, None]
    apart = own & ((explicit & is_anchor) | (c.match == 0)[None, :])
    if explicit_for_anchors:
        both_valid = both_valid & (is_anchor | ~explicit)
    positive = same_group & (~same_image | own) & ~apart & both_valid
    negative = (~same_group | apart) & ~same_image & both_valid
    return positive, negative
