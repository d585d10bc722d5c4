"""Runs a row loss over the batch of all ranks, exactly, in memory linear in the batch.

    gather -> chunks of local query rows against all candidates -> loss and gradient at once -> exact global mean

A chunk's graph is freed before the next, so memory is O(G * D + chunk) for G candidates of D numbers. The sum over all
ranks is divided by the count over all ranks: no other reduction is exact when ranks hold different numbers of terms.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trainer import collectives
from trainer.family import Found, Joined, Stats
from trainer.ids import Ids, Relations
from trainer.rows import RowLoss, Rows, Terms

Guard = Callable[[Rows, Tensor | None, Tensor | None], None]  # rows, targets of queries [q, E] and of candidates [G, E]
SPARSE = 64  # a gradient in fewer than 1 / SPARSE of the columns is not worth a matrix product


@dataclass(frozen=True, slots=True)
class Candidates:
    """Vectors [G, D] that queries are compared with, sorted by `Ids.order`."""

    vectors: Tensor
    norms: Tensor  # [G] squared
    ids: Ids
    place: Tensor  # [G]: where each stands in the order of ranks, memory last
    columns: Tensor  # [num_places]: the reverse of `place`, -1 for what is not among the candidates
    target: Tensor | None = None  # [G, E]

    @staticmethod
    def sort(vectors: Tensor, ids: Ids, target: Tensor | None) -> Candidates:
        """`vectors` [G, D] of all ranks in rank order; memory may follow them."""
        order = ids.order()
        vectors = vectors[order]
        target = None if target is None else target[order]
        return Candidates(vectors, squared_norms(vectors), ids.select(order), order, _reverse(order, len(order)), target)

    def select(self, columns: Tensor) -> Candidates:
        target = None if self.target is None else self.target[columns]
        place = self.place[columns]
        reverse = _reverse(place, len(self.columns))
        return Candidates(self.vectors[columns], self.norms[columns], self.ids.select(columns), place, reverse, target)


def _reverse(place: Tensor, size: int) -> Tensor:
    reverse = torch.full((size,), -1, dtype=torch.int64, device=place.device)
    reverse[place] = torch.arange(len(place), device=place.device)
    return reverse


@dataclass(frozen=True, slots=True)
class Pass:
    """Queries, as numbers of this rank's rows [q], and what they are compared with."""

    rows: Tensor
    candidates: Candidates
    mutual: bool = False  # all rows of views 0 and 1 are queries, and nothing but them and explicit negatives is a candidate


@dataclass(frozen=True, slots=True)
class Settings:
    """`norms`: gradients flow through the lengths of the vectors; `through_candidates`: also to the candidates.

    `first`: place of this rank's first row among those of all ranks; `guard` drops negatives of a chunk before mining.
    """

    norms: bool
    first: int
    through_candidates: bool = True
    guard: Guard | None = None


class Sums:
    """What is added up over chunks and passes: total, count, statistics and gradients."""

    def __init__(self, x: Tensor, num_places: int, parameters: Sequence[Tensor]) -> None:
        self.x = x  # [n, D] this rank's queries
        self.grad_queries = torch.zeros_like(x)
        self.grad_places = x.new_zeros((num_places, x.shape[1]))  # of candidates, in the order of ranks
        self.parameters = parameters
        self.grad_parameters = [torch.zeros_like(p, dtype=torch.float64) for p in parameters]
        self.numbers = torch.zeros(2, dtype=torch.float64, device=x.device)  # total, count
        self.stats: dict[str, Tensor] = {}

    def survey(self, loss: RowLoss, passes: Sequence[Pass], batch: Joined, settings: Settings) -> None:
        """Show all chunks of all passes to the loss before it computes. Collective: every rank calls it."""
        found = self.x.new_empty(0)
        with torch.no_grad():
            for one in passes:
                for chunk, _ in self._chunks(loss, one, batch, settings):
                    found = loss.thin(torch.cat([found, loss.survey(chunk)]))
        sizes = collectives.sizes(len(found), found.device)
        loss.settle(collectives.gather(found, sizes))

    def add(self, loss: RowLoss, one: Pass, batch: Joined, settings: Settings) -> None:
        """All chunks of a pass, forward and backward."""
        candidates = one.candidates
        grad_candidates = torch.zeros_like(candidates.vectors)
        for chunk, part in self._chunks(loss, one, batch, settings):
            if batch.with_stats:
                self._note(_row_stats(chunk))
            with torch.enable_grad():
                terms = loss(chunk)
            self._differentiate(chunk, terms, part, candidates, grad_candidates)
            self.numbers += torch.stack([terms.total.detach().double(), terms.count.double()])
            if batch.with_stats:
                self._note(terms.stats)
        if settings.through_candidates:
            self.grad_places.index_add_(0, candidates.place, grad_candidates)

    def _chunks(self, loss: RowLoss, one: Pass, batch: Joined, settings: Settings) -> Iterator[tuple[Rows, Tensor]]:
        """The pass as rows, with the numbers of the queries among x; a chunk is over when the next is asked for."""
        candidates = one.candidates
        if not len(candidates.place):
            return  # the same on every rank
        relations = Relations(candidates.ids)
        width = len(candidates.place) * self.x.element_size() * loss.temporaries
        per_chunk = max(1, min(batch.chunk_bytes // width, max(1, len(one.rows))))
        buffer = self.x.new_empty((per_chunk, len(candidates.place)))
        # Found once for all queries where groups are small; with large ones that would be a matrix.
        few = len(one.rows) * relations.widest * 64 <= batch.chunk_bytes
        related = relations.of(batch.ids.select(one.rows), explicit_for_anchors=loss.explicit_for_anchors) if few else None
        done = 0
        # A rank without queries still runs one empty chunk: it must know the same statistics as the others.
        for part in torch.split(one.rows, per_chunk):
            queries, own = self.x[part], batch.ids.select(part)
            torch.mm(queries, candidates.vectors.T, out=buffer[: len(part)])
            chunk = Rows(
                buffer[: len(part)],
                squared_norms(queries).requires_grad_(settings.norms),
                candidates.norms.detach().requires_grad_(settings.norms),
                relations.of(own, explicit_for_anchors=loss.explicit_for_anchors)
                if related is None
                else related.select(slice(done, done + len(part))),
                (own, candidates.ids),
                candidates.columns[settings.first + part],
                dim=self.x.shape[1],
                seed=batch.seed,
                with_stats=batch.with_stats,
                mutual=one.mutual and not relations.has_explicit,
            )
            if settings.guard is not None:
                settings.guard(chunk, None if batch.target is None else batch.target[part], candidates.target)
            done += len(part)
            yield chunk, part

    def reduce(self, num_rows: Sequence[int]) -> Found:
        """Sum over ranks and divide by the global count; without terms all of it is 0. Collective: every rank calls it."""
        names, shapes = list(self.stats), [p.numel() for p in self.parameters]
        flat = [self.numbers, *(self.stats[n] for n in names), *(g.flatten() for g in self.grad_parameters)]
        summed = collectives.total(torch.cat(flat))
        total, count = summed[:2].unbind()
        share = torch.where(count > 0, 1 / count.clamp_min(1e-300), torch.zeros_like(count))
        grad = self.grad_queries + collectives.scatter_sum(self.grad_places[: sum(num_rows)], num_rows)
        grad *= (share * collectives.world()).to(grad.dtype)
        pairs = summed[2 : 2 + 2 * len(names)].view(-1, 2)
        stats = {
            n: pair[0] if n.startswith("num_") else pair[0] / pair[1].clamp_min(1) for n, pair in zip(names, pairs, strict=True)
        }
        pieces = torch.split(summed[2 + 2 * len(names) :], shapes) if shapes else ()
        grads = [(g * share).view_as(p).to(p.dtype) for g, p in zip(pieces, self.parameters, strict=True)]
        return Found((total * share).to(grad.dtype), grad, grads, {**stats, "num_terms": count})

    def _differentiate(
        self,
        chunk: Rows,
        terms: Terms,
        part: Tensor,
        candidates: Candidates,
        grad_candidates: Tensor,
    ) -> None:
        queries = self.x[part]
        dense = terms.gradient
        picked: list[tuple[Tensor, Tensor]] = []
        parameters: Sequence[Tensor | None] = terms.parameter_gradients
        if dense is None:
            leaves = [leaf for _, leaf in chunk.picked]
            lengths = [t for t in (chunk.query_norms, chunk.candidate_norms) if t.requires_grad]
            wanted = [*chunk.leaves, *leaves, *lengths, *self.parameters]
            found = list(_grad(terms.total, wanted))
            dense = _sum(found[: len(chunk.leaves)])
            found = found[len(chunk.leaves) :]
            picked = [(columns, g) for (columns, _), g in zip(chunk.picked, found, strict=False) if g is not None]
            found = found[len(leaves) :]
            if lengths:
                self._add_lengths(part, queries, candidates, grad_candidates, *found[:2])
            parameters = found[len(lengths) :]
        self._add_similarity(chunk, dense, picked, part, queries, candidates, grad_candidates)
        for held, grad in zip(self.grad_parameters, parameters, strict=False):
            if grad is not None:
                held += grad.double()

    def _add_similarity(
        self,
        chunk: Rows,
        dense: Tensor | None,
        picked: Sequence[tuple[Tensor, Tensor]],
        part: Tensor,
        queries: Tensor,
        candidates: Candidates,
        grad_candidates: Tensor,
    ) -> None:
        """By matrix products, or where only few columns have a gradient, by those alone."""
        num_picked = sum(columns.shape[1] for columns, _ in picked)
        if dense is None and num_picked * max(SPARSE, queries.shape[1]) > len(candidates.place):
            dense = chunk.similarity.zero_()
        if dense is None:
            for columns, g in picked:
                self.grad_queries.index_add_(0, part, torch.bmm(g[:, None, :], candidates.vectors[columns])[:, 0])
                grad_candidates.index_add_(0, columns.flatten(), (g[:, :, None] * queries[:, None, :]).flatten(0, 1))
            return
        for columns, g in picked:
            dense.scatter_add_(1, columns, g)
        self.grad_queries.index_add_(0, part, dense @ candidates.vectors)
        grad_candidates.addmm_(dense.T, queries)

    def _add_lengths(
        self,
        part: Tensor,
        queries: Tensor,
        candidates: Candidates,
        grad_candidates: Tensor,
        grad_q: Tensor | None,
        grad_c: Tensor | None,
    ) -> None:
        if grad_q is not None:
            self.grad_queries.index_add_(0, part, 2 * grad_q[:, None] * queries)
        if grad_c is not None:
            grad_candidates += 2 * grad_c[:, None] * candidates.vectors

    def _note(self, stats: Stats) -> None:
        for name, pair in stats.items():
            self.stats[name] = self.stats.get(name, 0) + pair.double()


def squared_norms(x: Tensor) -> Tensor:
    """[n, D] -> [n]"""
    return (x * x).sum(1)


def _grad(total: Tensor, wanted: Sequence[Tensor]) -> Sequence[Tensor | None]:
    if not total.requires_grad or not wanted:
        return [None] * len(wanted)
    return torch.autograd.grad(total, wanted, allow_unused=True)


def _sum(grads: Sequence[Tensor | None]) -> Tensor | None:
    some = [g for g in grads if g is not None]
    return functools.reduce(torch.add, some) if some else None


def _row_stats(rows: Rows) -> Stats:
    """Mean similarities of positives and negatives, the mean hardest negative, and queries that lack either."""
    positive, negative = rows.is_positive, rows.negative
    num_positives, num_negatives = positive.sum(1), negative.sum(1)  # [q]
    near = rows.similarity.gather(1, rows.positives).where(positive, rows.similarity.new_zeros(()))
    far = rows.similarity.where(negative, rows.similarity.new_zeros(()))
    some = num_negatives > 0
    hardest = rows.similarity.masked_fill(~negative, -torch.inf).amax(1)[some].sum()
    lonely = ((num_positives == 0) | ~some).sum()
    return {
        "positive_similarity": torch.stack([near.double().sum(), num_positives.sum()]),
        "negative_similarity": torch.stack([far.double().sum(), num_negatives.sum()]),
        "hardest_negative_similarity": torch.stack([hardest, some.sum()]),
        "num_lonely_queries": torch.stack([lonely, lonely]),
    }
