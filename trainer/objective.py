"""The losses' public face: `build_objective(mapping)` gives the mean of a loss over the batch of all ranks."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from configs.registry import checked_options, resolve
from configs.schema import Part
from trainer import collectives
from trainer.engine import Candidates, Pass, Settings, Sums
from trainer.family import Family, Found, Joined, Stats
from trainer.ids import Ids
from trainer.rows import RowLoss


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
    `chunk_bytes` bounds the temporaries of one chunk (default 64 MiB on an accelerator, 32 MiB on a CPU).
    """

    def __init__(
        self,
        loss: RowLoss | Family,
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
        step: int = 0,
        with_stats: bool = True,
    ) -> tuple[Tensor, Stats]:
        """Global mean loss (the same scalar on every rank) and statistics. Collective: every rank calls it.

        `vectors` [n, D]; `group`, `uid`, `view`, `record` [n] int64; `match` [records] {0, 1}; `valid` [n] bool; `step`
        seeds random mining. Without `uid` every row is its own image; without `view` all rows are queries and candidates.
        Half precision is raised to fp32. Gradients: of `vectors`, the single-process gradient times the number of ranks, so
        that DDP's averaging gives the true one; of loss parameters, the true one on every rank.
        """
        work = vectors if vectors.dtype == torch.float64 else vectors.float()
        work = unit(work) if self.normalize else work
        num_rows = collectives.sizes(work.shape[0], work.device)
        needs_view = self.queries != "all" or self.candidates != "all"
        ids = _complete(num_rows, group, needs_view=needs_view, uid=uid, view=view, record=record, match=match, valid=valid)
        chunk_bytes = self.chunk_bytes or (32 if work.device.type == "cpu" else 64) * 2**20
        batch = Joined(ids, num_rows, None, step, with_stats, chunk_bytes)
        parameters = [p for p in self.parameters() if p.requires_grad]
        stats: Stats = {}

        def compute(x: Tensor) -> Found:
            found = self._compute(x, batch, parameters, given=match is not None)
            stats.update(found.stats)
            return found

        value: Tensor = _GlobalMean.apply(work, compute, *parameters)  # type: ignore[no-untyped-call]
        return value, stats

    def _compute(self, x: Tensor, batch: Joined, parameters: Sequence[Tensor], *, given: bool) -> Found:
        loss = self.loss
        if isinstance(loss, RowLoss) and given and loss.given is not None:
            loss = loss.given
        if not isinstance(loss, RowLoss):
            return loss.compute(x, batch, parameters)
        columns = collectives.gather(batch.ids.stack(), batch.num_rows)  # [G, 6]
        everyone = Candidates.sort(collectives.gather(x, batch.num_rows), Ids.unstack(columns), None)
        sums = Sums(x, len(everyone.place), parameters)
        settings = Settings(norms=not self.normalize, first=sum(batch.num_rows[: collectives.rank()]))
        passes = [self._pass(batch.ids, everyone, *views) for views in self._passes(loss)]
        if loss.surveys:
            sums.survey(loss, passes, batch, settings)
        for one in passes:
            sums.add(loss, one, batch, settings)
        return sums.reduce(batch.num_rows)

    def _pass(self, ids: Ids, everyone: Candidates, own: _Views, others: _Views) -> Pass:
        rows = (own(ids.view) & (ids.valid == 1)).nonzero()[:, 0]
        return Pass(rows, everyone if others is _all else everyone.select(others(everyone.ids.view).nonzero()[:, 0]))

    def _passes(self, loss: RowLoss) -> list[tuple[_Views, _Views]]:
        """(query views, candidate views) of every pass over the batch."""
        if self.candidates == "all":
            passes: list[tuple[_Views, _Views]] = [(_anchors if self.queries == "anchors" else _not_explicit, _all)]
        else:
            passes = [(_anchors, _others), *([(_positives, _anchors)] if self.queries == "all" else [])]
        if self.queries == "anchors" and loss.symmetric:
            passes.append((_positives, _all if self.candidates == "all" else _anchors))
        return passes


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
    def forward(ctx: Any, x: Tensor, compute: Callable[[Tensor], Found], *parameters: Tensor) -> Tensor:
        found = compute(x.detach())
        ctx.save_for_backward(found.grad, *found.grads)
        return found.value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_value: Tensor) -> Any:
        grad, *parameter_grads = ctx.saved_tensors
        return grad * grad_value, None, *(g * grad_value.to(g.dtype) for g in parameter_grads)


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
