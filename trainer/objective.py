"""Any row loss over the batch of all ranks, exactly, in memory linear in the batch.

    gather -> chunks of local query rows against all candidates -> masks -> loss -> exact global mean

A chunk's loss and its gradient are computed in one go and its graph is freed before the next, so memory is
O(G * D + chunk) for G candidates of D numbers. The sum over all ranks is divided by the count over all ranks: no other
reduction is exact when ranks hold different numbers of terms.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from configs.registry import checked_options, resolve
from configs.schema import Part
from trainer import collectives
from trainer.rows import Ids, Rows, masks

Stats = dict[str, Tensor]


def build_objective(loss: Mapping[str, Any] | Part) -> Objective:
    """The objective for a config's `loss` section, `{name, **options}`.

    Raises ValueError for an unknown name or option.
    """
    part = loss if isinstance(loss, Part) else Part.model_validate(dict(loss))
    function = resolve("loss", part.name)
    engine = [name for name in inspect.signature(Objective).parameters if name != "loss"]
    own = checked_options("loss", part, function, context=(), also=engine)
    shared = Part.model_validate({"name": part.name, **{k: v for k, v in part.options.items() if k in engine}})
    return Objective(function(**own), **checked_options("loss", shared, Objective, context=["loss"]))


class Objective(nn.Module):
    """The mean of `loss` over the global batch; loss parameters are its parameters.

    `normalize` scales vectors to unit length first. `queries` and `candidates` choose rows and columns:
    `all`: views 0 and 1 against everything; `anchors`, `other_view`: view 0 against the other views.
    `chunk_bytes` bounds the temporaries of one chunk (default 64 MiB on an accelerator, 8 MiB on a CPU).
    """

    def __init__(
        self,
        loss: nn.Module,
        normalize: bool = True,
        queries: Literal["all", "anchors"] = "all",
        candidates: Literal["all", "other_view"] = "all",
        chunk_bytes: int | None = None,
    ) -> None:
        super().__init__()
        if chunk_bytes is not None and chunk_bytes <= 0:
            raise ValueError(f"loss.chunk_bytes: must be above 0, got {chunk_bytes}")
        self.loss = loss
        self.normalize = normalize
        self.queries = queries
        self.candidates = candidates
        self.chunk_bytes = chunk_bytes

    def forward(
        self,
        vectors: Tensor,
        group: Tensor,
        *,
        uid: Tensor | None = None,
        view: Tensor | None = None,
        record: Tensor | None = None,
        match: Tensor | None = None,
        valid: Tensor | None = None,
    ) -> tuple[Tensor, Stats]:
        """Global mean loss (the same scalar on every rank) and statistics. Collective: every rank calls it.

        `vectors` [n, D]; `group`, `uid`, `view`, `record` [n] int64; `match` [records] {0, 1}; `valid` [n] bool.
        Without `uid` every row is its own image; without `view` all rows are queries and candidates. Half precision is
        raised to fp32. Gradients: of `vectors`, the single-process gradient times the number of ranks, so that DDP's
        averaging gives the true one; of loss parameters, the true one on every rank.
        """
        work = vectors if vectors.dtype == torch.float64 else vectors.float()
        work = unit(work) if self.normalize else work
        num_rows = collectives.sizes(work.shape[0], work.device)
        needs_view = self.queries != "all" or self.candidates != "all"
        ids = _complete(num_rows, group, needs_view=needs_view, uid=uid, view=view, record=record, match=match, valid=valid)
        stats: Stats = {}
        parameters = [p for p in self.parameters() if p.requires_grad]
        value: Tensor = _GlobalMean.apply(  # type: ignore[no-untyped-call]
            work, lambda x: self._compute(x, ids, num_rows, parameters, stats), *parameters
        )
        return value, stats

    def _compute(
        self, x: Tensor, ids: Ids, num_rows: Sequence[int], parameters: Sequence[Tensor], stats: Stats
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Value, gradient of x [n, D] (times the number of ranks), gradients of the loss parameters."""
        batch = _gather(x, ids, num_rows)
        sums = _Sums(x, batch.vectors, parameters)
        for own_views, other_views in self._passes():
            for chunk in self._chunks(x, ids, batch, own_views, other_views):
                sums.add(chunk, self.loss, norms=not self.normalize)
        return sums.reduce(batch, num_rows, stats)

    def _passes(self) -> list[tuple[_Views, _Views]]:
        """(query views, candidate views) of every pass over the batch."""
        if self.candidates == "all":
            passes: list[tuple[_Views, _Views]] = [(_anchors if self.queries == "anchors" else _not_explicit, _all)]
        else:
            passes = [(_anchors, _others), *([(_positives, _anchors)] if self.queries == "all" else [])]
        if self.queries == "anchors" and getattr(self.loss, "symmetric", False):
            passes.append((_positives, _all if self.candidates == "all" else _anchors))
        return passes

    def _chunks(self, x: Tensor, ids: Ids, batch: _Gathered, own_views: _Views, other_views: _Views) -> list[_Chunk]:
        rows = own_views(ids.view).nonzero()[:, 0]
        columns = None if other_views is _all else other_views(batch.ids.view).nonzero()[:, 0]
        num_columns = batch.vectors.shape[0] if columns is None else columns.numel()
        per_chunk = self._rows_per_chunk(x, num_columns)
        explicit_for_anchors = bool(getattr(self.loss, "explicit_for_anchors", False))
        # A rank without queries still runs one empty chunk: it must know the same statistics as the others.
        parts = torch.split(rows, per_chunk) if num_columns else ()
        return [_Chunk(part, columns, ids.select(part), batch, explicit_for_anchors) for part in parts]

    def _rows_per_chunk(self, x: Tensor, num_columns: int) -> int:
        budget = self.chunk_bytes or (8 if x.device.type == "cpu" else 64) * 2**20
        arrays = int(getattr(self.loss, "temporaries", 8)) + 2
        return max(1, budget // (arrays * x.element_size() * max(1, num_columns)))


_Views = Callable[[Tensor], Tensor]


def _all(view: Tensor) -> Tensor:
    return torch.ones_like(view, dtype=torch.bool)


def _not_explicit(view: Tensor) -> Tensor:
    return view <= 1


def _anchors(view: Tensor) -> Tensor:
    return view == 0


def _positives(view: Tensor) -> Tensor:
    return view == 1


def _others(view: Tensor) -> Tensor:
    return view != 0


def unit(x: Tensor) -> Tensor:
    """Rows of x [n, D] at unit length; a zero row stays zero, with gradient zero."""
    squared = (x * x).sum(1, keepdim=True)
    positive = squared > 0
    return x * torch.where(positive, squared, torch.ones_like(squared)).rsqrt() * positive


class _GlobalMean(torch.autograd.Function):
    """Runs `compute` once, in forward; backward only scales the gradients it found."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, compute: Callable[[Tensor], Any], *parameters: Tensor) -> Tensor:
        value, grad, parameter_grads = compute(x.detach())
        ctx.save_for_backward(grad, *parameter_grads)
        return value  # type: ignore[no-any-return]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_value: Tensor) -> Any:
        grad, *parameter_grads = ctx.saved_tensors
        return grad * grad_value, None, *(g * grad_value.to(g.dtype) for g in parameter_grads)


@dataclass(frozen=True, slots=True)
class _Gathered:
    """The candidates of all ranks, sorted by (uid, view, record) so that ties and sums do not depend on ranks."""

    vectors: Tensor  # [G, D]
    ids: Ids
    order: Tensor  # [G]: row i of `vectors` is row order[i] in rank order


def _gather(x: Tensor, ids: Ids, num_rows: Sequence[int]) -> _Gathered:
    columns = collectives.gather(ids.stack(), num_rows)  # [G, 6]
    order = torch.arange(columns.shape[0], device=x.device)
    for key in (columns[:, 3], columns[:, 2], columns[:, 1]):  # record, view, uid: the last sort counts most
        order = order[key[order].argsort(stable=True)]
    return _Gathered(collectives.gather(x, num_rows)[order], Ids.unstack(columns[order]), order)


def _complete(num_rows: Sequence[int], group: Tensor, *, needs_view: bool, **given: Tensor | None) -> Ids:
    """Fill in what the caller left out, check shapes, and make `record` global."""
    if given["view"] is None and needs_view:
        raise ValueError("queries: anchors and candidates: other_view need `view`: 0 anchor, 1 positive, 2.. negatives")
    n, device, start = num_rows[collectives.rank()], group.device, sum(num_rows[: collectives.rank()])
    for name, tensor in (("group", group), *given.items()):
        if tensor is not None and name != "match" and tensor.shape != (n,):
            raise ValueError(f"{name}: expected shape [{n}], one number for each vector, got {list(tensor.shape)}")
    row = torch.arange(start, start + n, device=device)
    record, match, valid = given["record"], given["match"], given["valid"]
    if match is not None and record is None:
        raise ValueError("match needs record: it says which pair every row belongs to")
    ones = torch.ones_like(row)
    return Ids(
        group=group.long(),
        uid=row if given["uid"] is None else given["uid"].long(),
        view=torch.zeros_like(row) if given["view"] is None else given["view"].long(),
        # Records are numbered from 0 on every rank; a rank has no more records than rows, so its first row is a safe offset.
        record=row if record is None else record.long() + start,
        match=ones if match is None or record is None else match.long()[record],
        valid=ones if valid is None else valid.long(),
    )


@dataclass(frozen=True, slots=True)
class _Chunk:
    rows: Tensor  # [q] local rows that are queries
    columns: Tensor | None  # candidates taken part, None: all
    ids: Ids
    batch: _Gathered
    explicit_for_anchors: bool


class _Sums:
    """What is added up over chunks: total, count, statistics and gradients."""

    def __init__(self, x: Tensor, candidates: Tensor, parameters: Sequence[Tensor]) -> None:
        self.x = x
        self.grad_queries = torch.zeros_like(x)  # [n, D]
        self.grad_candidates = torch.zeros_like(candidates)  # [G, D]
        self.parameters = parameters
        self.grad_parameters = [torch.zeros_like(p, dtype=torch.float64) for p in parameters]
        self.numbers = torch.zeros(2, dtype=torch.float64, device=x.device)  # total, count
        self.stats: dict[str, Tensor] = {}

    def add(self, chunk: _Chunk, loss: nn.Module, *, norms: bool) -> None:
        """One chunk forward and backward; `norms`: whether gradients flow through the lengths of the vectors."""
        every, columns, queries = chunk.batch, chunk.columns, self.x[chunk.rows]
        candidates = every.vectors if columns is None else every.vectors[columns]
        ids = every.ids if columns is None else every.ids.select(columns)
        positive, negative = masks(chunk.ids, ids, explicit_for_anchors=chunk.explicit_for_anchors)
        similarity = (queries @ candidates.T).requires_grad_()  # [q, G]
        query_norms = (queries * queries).sum(1).requires_grad_(norms)  # [q]
        candidate_norms = (candidates * candidates).sum(1).requires_grad_(norms)  # [G]
        with torch.enable_grad():
            terms = loss(Rows(similarity, query_norms, candidate_norms, positive, negative))
        wanted = [similarity, *((query_norms, candidate_norms) if norms else ()), *self.parameters]
        found: Sequence[Tensor | None] = [None] * len(wanted)
        if terms.total.requires_grad:
            found = torch.autograd.grad(terms.total, wanted, allow_unused=True)
        self._add_similarity(chunk, found[0], queries, candidates)
        if norms:
            self._add_lengths(chunk, *found[1:3], queries=queries, candidates=candidates)
        for held, grad in zip(self.grad_parameters, found[len(wanted) - len(self.parameters) :], strict=True):
            if grad is not None:
                held += grad.double()
        self.numbers += torch.stack([terms.total.detach().double(), terms.count.double()])
        for name, pair in {**terms.stats, **_mask_stats(similarity.detach(), positive, negative)}.items():
            self.stats[name] = self.stats.get(name, 0) + pair.double()

    def _add_similarity(self, chunk: _Chunk, grad: Tensor | None, queries: Tensor, candidates: Tensor) -> None:
        if grad is None:
            return
        self.grad_queries.index_add_(0, chunk.rows, grad @ candidates)
        if chunk.columns is None:
            self.grad_candidates.addmm_(grad.T, queries)
        else:
            self.grad_candidates.index_add_(0, chunk.columns, grad.T @ queries)

    def _add_lengths(
        self, chunk: _Chunk, grad_q: Tensor | None, grad_c: Tensor | None, *, queries: Tensor, candidates: Tensor
    ) -> None:
        columns = slice(None) if chunk.columns is None else chunk.columns
        if grad_q is not None:
            self.grad_queries.index_add_(0, chunk.rows, 2 * grad_q[:, None] * queries)
        if grad_c is not None:
            self.grad_candidates[columns] += 2 * grad_c[:, None] * candidates  # each column once: += loses nothing

    def reduce(self, batch: _Gathered, num_rows: Sequence[int], stats: Stats) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Sum over ranks, divide by the global count. Collective: every rank calls it."""
        names = list(self.stats)
        shapes = [p.numel() for p in self.parameters]
        flat = [self.numbers, *(self.stats[n] for n in names), *(g.flatten() for g in self.grad_parameters)]
        summed = collectives.total(torch.cat(flat))
        total, count = summed[:2].unbind()
        share = torch.where(count > 0, 1 / count.clamp_min(1e-300), torch.zeros_like(count))
        in_rank_order = torch.empty_like(self.grad_candidates)
        in_rank_order[batch.order] = self.grad_candidates
        grad = self.grad_queries + collectives.scatter_sum(in_rank_order, num_rows)
        grad *= (share * collectives.world()).to(grad.dtype)
        rest = summed[2 + 2 * len(names) :]
        for i, name in enumerate(names):
            part, of = summed[2 + 2 * i : 4 + 2 * i].unbind()
            stats[name] = part if name.startswith("num_") else part / of.clamp_min(1)
        stats["num_terms"] = count
        pieces = torch.split(rest, shapes) if shapes else ()
        grads = [(g * share).view_as(p).to(p.dtype) for g, p in zip(pieces, self.parameters, strict=True)]
        return (total * share).to(grad.dtype), grad, grads


def _mask_stats(similarity: Tensor, positive: Tensor, negative: Tensor) -> dict[str, Tensor]:
    lonely = (~(positive.any(1) & negative.any(1))).sum()
    of = torch.ones_like(lonely)
    return {
        "positive_similarity": torch.stack([(similarity * positive).sum(), positive.sum()]),
        "negative_similarity": torch.stack([(similarity * negative).sum(), negative.sum()]),
        "num_lonely_queries": torch.stack([lonely, of]),
    }
