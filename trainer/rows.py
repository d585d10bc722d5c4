"""A chunk of query rows against all candidates: what a loss sees, and what it answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor, nn

from trainer.distance import Distance, distances
from trainer.family import Family
from trainer.ids import Ids, Related


class Rows:
    """q local queries against G candidates of all ranks, candidates sorted by uid, so that no rank number enters.

    Plain attributes carry no gradient: mine with them. What a loss is made of it takes from `at`, `distance_at` (a few
    columns, cheap), `negatives`, `negative_distances` (all negatives) or `dense`, `distance` (all columns): these are
    differentiable.
    """

    def __init__(
        self,
        similarity: Tensor,
        query_norms: Tensor,
        candidate_norms: Tensor,
        related: Related,
        ids: tuple[Ids, Ids],
        place: Tensor,
        *,
        dim: int,
        seed: int = 0,
        with_stats: bool = True,
        mutual: bool = False,
    ) -> None:
        self.similarity = similarity  # [q, G] dot products of the vectors as used; scratch, a loss may overwrite it
        self.query_norms, self.candidate_norms = query_norms, candidate_norms  # [q], [G] squared
        self.positives, self.is_positive = related.columns, related.is_positive  # [q, P] columns, bool
        self.queries, self.candidates = ids
        self.place = place  # [q] the query's own column; -1 where the candidates are other views
        self.dim = dim  # length of the vectors
        self.mutual = mutual  # every candidate is a query as well, of some rank: each pair is met from both sides
        self.with_stats = with_stats  # whether anybody looks at the statistics of this step
        self.seed = seed  # of this step, the same on all ranks
        self.picked: list[tuple[Tensor, Tensor]] = []  # (columns, leaf) of every `at`
        self.leaves: list[Tensor] = []  # [q, G] of `dense` and `negatives`
        self._related = related
        self._dropped: list[Tensor] = []

    @cached_property
    def negative(self) -> Tensor:
        """Which candidates are negatives, after the guards.  [q, G] bool"""
        return self.bar_(torch.ones_like(self.similarity, dtype=torch.bool), False)

    def bar_(self, matrix: Tensor, value: float) -> Tensor:
        """Overwrite [q, G] by `value` where the candidate is no negative of the query."""
        self._related.bar_(matrix, value)
        for dropped in self._dropped:
            matrix.masked_fill_(dropped, value)
        return matrix

    def drop(self, candidates: Tensor) -> None:
        """These are no negatives after all.  [q, G] bool"""
        self._dropped.append(candidates)

    def at(self, columns: Tensor) -> Tensor:
        """Similarities at `columns` [q, k], differentiable."""
        leaf = self.similarity.gather(1, columns).requires_grad_()
        self.picked.append((columns, leaf))
        return leaf

    @cached_property
    def num_negatives(self) -> Tensor:
        """How many negatives each query has, after the guards.  [q] int64"""
        few = None if self._dropped else self._related.num_negatives(self.similarity.shape[1])
        return self.negative.sum(1) if few is None else few

    def dense(self) -> Tensor:
        """All similarities [q, G], differentiable."""
        return self._dense

    def negatives(self) -> Tensor:
        """Similarities [q, G], differentiable; -inf where the candidate is no negative, after the guards.

        `exp`, `relu`, `softplus` and `logsumexp` of them are 0 there with gradient 0, so that no mask is needed: masks and
        `where` cost several times as much as arithmetic on a CPU.
        """
        return self._negatives

    def distance_at(self, columns: Tensor, kind: Distance) -> Tensor:
        """Distances at `columns` [q, k], differentiable; the square root is safe at 0 in value and in gradient."""
        return distances(self.at(columns), self.query_norms[:, None], self.candidate_norms[columns], kind)

    def distance(self, kind: Distance) -> Tensor:
        """All distances [q, G], differentiable."""
        return distances(self.dense(), self.query_norms[:, None], self.candidate_norms[None, :], kind)

    def negative_distances(self, kind: Distance) -> Tensor:
        """Distances [q, G], differentiable; inf where the candidate is no negative. See `negatives`."""
        return distances(self.negatives(), self.query_norms[:, None], self.candidate_norms[None, :], kind)

    @cached_property
    def _dense(self) -> Tensor:
        self.leaves.append(self.similarity.detach().requires_grad_())
        return self.leaves[-1]

    @cached_property
    def _negatives(self) -> Tensor:
        self.leaves.append(self.bar_(self.similarity.detach().clone(), -torch.inf).requires_grad_())
        return self.leaves[-1]

    def nearness(self, kind: Distance, columns: Tensor | None = None) -> Tensor:
        """A number that falls as the distance grows, without gradient: for mining.  [q, G], or [q, k] at `columns`"""
        similarity = self.similarity if columns is None else self.similarity.gather(1, columns)
        if kind == "cosine" or not self.candidate_norms.requires_grad:
            return similarity
        norms = self.candidate_norms.detach()
        return 2 * similarity - (norms[None, :] if columns is None else norms[columns])


@dataclass(frozen=True, slots=True)
class Terms:
    """A chunk's share of the loss: the sum of its terms and how many there are, both scalars.

    A loss that knows its gradient gives it: `gradient` [q, G] by similarity, and one for each of the loss's parameters.
    """

    total: Tensor
    count: Tensor
    stats: dict[str, Tensor] = field(default_factory=dict)  # name -> [2]: (sum, count), summed over chunks and ranks
    gradient: Tensor | None = None
    parameter_gradients: Sequence[Tensor] = ()


class RowLoss(nn.Module):
    """A loss over rows: differentiable sums and counts; the engine divides by the count of all ranks.

    With `surveys`, all chunks are shown to `survey` first; what it finds on all ranks goes to `settle`, then the loss runs.
    """

    symmetric = False  # with `queries: anchors`, also from positives to anchors
    explicit_for_anchors = False  # explicit negatives are candidates of view 0 only
    surveys = False
    given: Family | None = None  # used instead when the caller says which pairs match
    temporaries = 8  # how many [q, G] arrays of the similarity's type live at once, similarity and gradient included

    def forward(self, rows: Rows) -> Terms:
        raise TypeError(f"{type(self).__name__} computes no terms")

    def survey(self, rows: Rows) -> Tensor:
        """What the loss must know of all chunks before it can compute one, without gradient.  [m]"""
        raise TypeError(f"{type(self).__name__} surveys nothing")

    def thin(self, found: Tensor) -> Tensor:
        """Drop what cannot matter any more, so that a rank's findings stay small.  [m] -> [at most m]"""
        return found

    def settle(self, found: Tensor) -> None:
        """Take the findings of all ranks, the same on every rank, in no particular order.  [m]"""


def fraction(mask: Tensor, of: Tensor) -> Tensor:
    """How many of `of` are also in `mask`, as a statistic (sum, count).  [2]"""
    return torch.stack([(mask & of).sum(), of.sum()])
