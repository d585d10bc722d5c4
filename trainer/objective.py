"""The losses' public face: `build_objective(mapping)` gives the mean of a loss over the batch of all ranks."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from configs.plain import shorten
from configs.registry import checked, checked_options, require, resolve
from configs.schema import Part
from trainer import collectives
from trainer.combine import Prefixes, Weighted
from trainer.engine import Candidates, Pass, Settings, Sums
from trainer.family import Family, Found, Joined, Stats
from trainer.guards import Guards
from trainer.ids import Ids, complete
from trainer.memory import Memory
from trainer.rows import RowLoss


def build_objective(
    loss: Mapping[str, Any] | Part | Sequence[Mapping[str, Any] | Part],
    *,
    dim: int | None = None,
    groups: Tensor | None = None,
    counts: Tensor | None = None,
) -> nn.Module:
    """The objective for a config's `loss` section: `{name, **options}`, or a list of them, each with a `weight`.

    It is called as `Objective.forward`. `dim`: length of the vectors, `groups` [C] int64: the classes, `counts` [C]: their
    images; losses with class centres take from them what their options leave open. Raises ValueError for an unknown name or
    option.
    """
    if isinstance(loss, (Mapping, Part)):
        known = {"dim": dim, "num_classes": None if groups is None else len(groups)}
        objective = _build(loss if isinstance(loss, Part) else Part.model_validate(dict(loss)), known)
        for module in objective.modules():
            set_classes = getattr(module, "set_classes", None)
            if groups is not None and callable(set_classes):
                set_classes(groups, counts)
        return objective
    parts = [part if isinstance(part, Part) else Part.model_validate(dict(part)) for part in loss]
    if not parts:
        raise ValueError("loss: an empty list; name at least one loss")
    names = [part.name if sum(p.name == part.name for p in parts) == 1 else f"{part.name}_{i}" for i, part in enumerate(parts)]
    # A pair of weights is contrastive's own option; one number is the part's share of the sum.
    scalar = [part for part in parts if isinstance(part.options.get("weight"), (int, float))]
    weights = [checked("loss.weight", part.options["weight"], float) if part in scalar else 1.0 for part in parts]
    bare = [_without(part, "weight") if part in scalar else part for part in parts]
    given = {"dim": dim, "groups": groups, "counts": counts}
    return Weighted(
        {n: build_objective(part, **given) for n, part in zip(names, bare, strict=True)},  # type: ignore[arg-type]
        weights,
    )


def _build(part: Part, known: Mapping[str, int | None]) -> nn.Module:
    dims = checked("loss.matryoshka", part.options.get("matryoshka"), list[int] | None)
    part = _without(part, "matryoshka")
    function = resolve("loss", part.name)
    asked = inspect.signature(function).parameters
    for name, value in known.items():
        if name in asked and value is not None and part.options.get(name, value) != value:
            raise ValueError(f"loss.{name}: {shorten(part.options[name])} where data and encoder have {value}; leave it out")
    filled = {name: value for name, value in known.items() if value is not None and name in asked}
    part = Part.model_validate({"name": part.name, **filled, **part.options})
    engine = [name for name in inspect.signature(Objective).parameters if name != "loss"]
    own = checked_options("loss", part, function, context=(), also=[*engine, "matryoshka"])
    shared = Part.model_validate({"name": part.name, **{k: v for k, v in part.options.items() if k in engine}})
    loss = function(**own)
    require("loss", part, loss, (RowLoss, Family))
    objective = Objective(loss, **checked_options("loss", shared, Objective, context=["loss"]))
    if dims is None:
        return objective
    if objective.memory is not None:
        raise ValueError("loss.matryoshka: cannot be joined with loss.memory, which holds vectors of one length; drop one")
    return Prefixes(objective, dims)


def _without(part: Part, key: str) -> Part:
    return Part.model_validate({"name": part.name, **{k: v for k, v in part.options.items() if k != key}})


class Objective(nn.Module):
    """The mean of `loss` over the global batch; loss parameters are its parameters.

    `normalize` scales vectors to unit length first. `queries` and `candidates` choose rows and columns:
    `all`: views 0 and 1 against everything; `anchors`, `other_view`: view 0 against the other views.
    `memory`: how many embeddings of past steps are further candidates, from step `memory_start` on. `ignore_*`: see Guards.
    `wire: bf16` halves the bytes of the gather; candidates (not queries, nor gradients) are rounded to 8 bits of mantissa.
    `chunk_bytes` bounds the temporaries of one chunk (default 32 MiB on a CPU, 1 GiB on an accelerator, where shorter kernels
    take less time than their launch).
    """

    def __init__(
        self,
        loss: RowLoss | Family,
        normalize: bool = True,
        queries: Literal["all", "anchors"] = "all",
        candidates: Literal["all", "other_view"] = "all",
        memory: Annotated[int, Field(ge=0, le=2**31)] = 0,
        memory_start: Annotated[int, Field(ge=0, le=10**9)] = 0,
        ignore_above: float | None = None,
        ignore_above_ratio: float | None = None,
        ignore_closer_than: float | None = None,
        wire: Literal["fp32", "bf16"] = "fp32",
        chunk_bytes: Annotated[int, Field(ge=1, le=2**40)] | None = None,
    ) -> None:
        super().__init__()
        if chunk_bytes is not None and chunk_bytes <= 0:
            raise ValueError(f"loss.chunk_bytes: must be above 0, got {chunk_bytes}")
        self.loss = loss
        self.normalize = normalize
        self.queries = queries
        self.candidates = candidates
        self.memory = Memory(memory, memory_start) if memory else None
        self.guards = Guards(ignore_above, ignore_above_ratio, ignore_closer_than)
        self.wire = wire
        self.chunk_bytes = chunk_bytes
        if not isinstance(loss, RowLoss) and (memory or self.guards.on):
            raise ValueError(
                f"loss.memory and loss.ignore_*: {type(loss).__name__} chooses no candidates, so it has none to keep"
            )
        if self.memory is not None and ignore_closer_than is not None:
            raise ValueError("loss.ignore_closer_than: targets are not remembered, so it cannot be joined with loss.memory")

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
        keys: Tensor | None = None,
        target: Tensor | None = None,
        step: int = 0,
        with_stats: bool = True,
    ) -> tuple[Tensor, Stats]:
        """Global mean loss (the same scalar on every rank) and statistics. Collective: every rank calls it.

        `vectors` [n, D]; `group`, `uid`, `view`, `record` [n] int64; `match` [records] {0, 1}; `valid` [n] bool; `keys`
        [n, D]: a momentum encoder's vectors, candidates in place of `vectors`, without gradient; `target` [n, E]: a teacher's
        or frozen space. `step` seeds random mining. Without `uid` every row is its own image; without `view` all rows are
        queries and candidates. Half precision is raised to fp32. Gradients: of `vectors`, the single-process gradient times
        the number of ranks, so that DDP's averaging gives the true one; of loss parameters, the true one on every rank.
        """
        work = _raised(vectors)
        work = unit(work) if self.normalize else work
        num_rows = collectives.sizes(work.shape[0], work.device)
        needs_view = self.queries != "all" or self.candidates != "all"
        ids = complete(num_rows, group, needs_view=needs_view, uid=uid, view=view, record=record, match=match, valid=valid)
        keys = None if keys is None else unit(_raised(keys.detach())) if self.normalize else _raised(keys.detach())
        target = None if target is None else target.detach().to(work.dtype)
        for name, given in (("keys", keys), ("target", target)):
            if given is not None and given.shape[0] != work.shape[0]:
                raise ValueError(f"{name}: expected {work.shape[0]} rows, one for each vector, got {given.shape[0]}")
        chunk_bytes = self.chunk_bytes or (2**25 if work.device.type == "cpu" else 2**30)
        batch = Joined(ids, num_rows, target, step, with_stats, chunk_bytes)
        parameters = [p for p in self.parameters() if p.requires_grad]
        stats: Stats = {}

        def compute(x: Tensor) -> Found:
            loss = self.loss
            if isinstance(loss, RowLoss) and match is not None and loss.given is not None:
                loss = loss.given
            if isinstance(loss, RowLoss):
                found = self._rows(loss, x, keys, batch, parameters)
            else:
                found = loss.compute(x, batch, parameters)
            stats.update(found.stats)
            return found

        value: Tensor = _GlobalMean.apply(work, compute, *parameters)  # type: ignore[no-untyped-call]
        return value, stats

    def _rows(self, loss: RowLoss, x: Tensor, keys: Tensor | None, batch: Joined, parameters: Sequence[Tensor]) -> Found:
        views = self._passes(loss)
        everyone = self._everyone(x if keys is None else keys, batch, [others for _, others in views])
        sums = Sums(x, len(everyone.columns), parameters)
        settings = Settings(
            norms=not self.normalize,
            first=sum(batch.num_rows[: collectives.rank()]),
            through_candidates=keys is None,
            guard=self.guards if self.guards.on else None,
        )
        if self.guards.ignore_closer_than is not None and batch.target is not None:
            batch = replace(batch, target=unit(batch.target))
        alone = keys is None and len(everyone.columns) == sum(batch.num_rows)  # candidates are the queries, nothing else
        passes = [self._pass(batch.ids, everyone, *pair, alone=alone) for pair in views]
        if loss.surveys:
            sums.survey(loss, passes, batch, settings)
        for one in passes:
            sums.add(loss, one, batch, settings)
        return sums.reduce(batch.num_rows)

    def _everyone(self, x: Tensor, batch: Joined, views: Sequence[_Views]) -> Candidates:
        """The candidates of all ranks, and what is remembered behind them; then remembers those of `views`."""
        wire = x.bfloat16() if self.wire == "bf16" else x  # rounded with one rank too: the result is the same on any number
        vectors = collectives.gather(wire, batch.num_rows).to(x.dtype)
        ids = Ids.unstack(collectives.gather(batch.ids.stack(), batch.num_rows))
        target = None
        if self.guards.ignore_closer_than is not None and batch.target is not None:
            target = collectives.gather(unit(batch.target), batch.num_rows)
        if self.memory is None:
            return Candidates.sort(vectors, ids, target)
        past = self.memory.candidates()
        order = ids.order()
        order = order[torch.stack([of_use(ids.view[order]) for of_use in views]).any(0)]
        self.memory.remember(vectors[order], ids.select(order))
        if past is not None:
            vectors = torch.cat([vectors, past[0].to(vectors)])
            ids = Ids.unstack(torch.cat([ids.stack(), past[1].stack().to(vectors.device)]))
        return Candidates.sort(vectors, ids, None)

    def _pass(self, ids: Ids, everyone: Candidates, own: _Views, others: _Views, *, alone: bool) -> Pass:
        rows = (own(ids.view) & (ids.valid == 1)).nonzero()[:, 0]
        if others is _all:
            return Pass(rows, everyone, mutual=alone and own is _not_explicit)
        return Pass(rows, everyone.select(others(everyone.ids.view).nonzero()[:, 0]))

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
    """Rows of x [n, D] at unit length, 16 bits raised to 32; a zero row stays zero, with gradient zero."""
    x = _raised(x)  # squares of small numbers vanish in fp16
    squared = (x * x).sum(1, keepdim=True)
    positive = squared > 0
    return x * torch.where(positive, squared, torch.ones_like(squared)).rsqrt() * positive


def _raised(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


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
