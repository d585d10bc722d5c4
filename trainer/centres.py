"""Class centres that are parameters of a loss, compared with the samples of all ranks.

A rank works on its own slice of the classes, [C r // W, C (r + 1) // W), against everybody's samples: no rank computes
what another does. The parameters are either whole on every rank (their gradients are gathered) or, above a size, sharded:
a rank holds its slice only, and the slice's gradient needs no collective. Sharded parameters must not be broadcast from
one rank, a norm over all gradients must add up theirs over ranks, and a checkpoint needs `gather_state` and `load_full`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from trainer import collectives
from trainer.family import Family, Found, Joined, Stats
from trainer.objective import unit

SHARD_ABOVE = 2**24  # numbers: 64 MiB in fp32, three times that with Adam's moments
BLOCK = 1024  # rows that are drawn from one seed, so that a slice can be drawn alone
Shard = Literal["auto"] | bool
Classes = Annotated[int, Field(ge=1, le=2**31)]


@dataclass(frozen=True, slots=True)
class Samples:
    """The rows of all ranks that belong to a class, alike on every rank, and the slice of classes to compare them with."""

    x: Tensor  # [N, D]
    label: Tensor  # [N] class 0..C-1
    first: int  # the slice's first class
    num: int  # its classes
    widest: int  # the most classes of any rank: chunks made by it are alike on every rank
    chunk_bytes: int
    with_stats: bool


@dataclass(frozen=True, slots=True)
class Share:
    """What a rank's classes contribute: a scalar, already divided by the global count, and its gradients."""

    value: Tensor
    grad_x: Tensor  # [N, D]
    grad_centres: Tensor  # as the centres
    grad_bias: Tensor | None = None  # [num]
    stats: Stats | None = None  # name -> (sum, count), of this rank


class Centres(Family):
    """`per_class` centres [dim] for each of `num_classes` groups; with `cosine` they and the vectors are unit vectors.

    Rows whose group is no class are left out. Vectors of fewer than `dim` numbers meet the centres' first numbers.
    Raises ValueError when no row of the first batch belongs to a class. Building a sharded one is collective.
    """

    cosine = True

    def __init__(self, num_classes: int, dim: int, *, per_class: int = 1, shard: Shard = "auto", bias: bool = False) -> None:
        super().__init__()
        for name, number in (("num_classes", num_classes), ("dim", dim), ("sub_centers", per_class)):
            if number < 1:
                raise ValueError(f"loss.{name}: must be at least 1, got {number}")
        self.num_classes, self.dim, self.per_class = num_classes, dim, per_class
        large = num_classes * per_class * dim > SHARD_ABOVE
        self.sharded = collectives.world() > 1 and (large if shard == "auto" else shard)
        self.classes: Tensor
        self.register_buffer("classes", torch.arange(num_classes))
        rows = (0, num_classes * per_class)
        seed = int(torch.randint(2**40, ()))
        if self.sharded:
            rows = self._rows(collectives.rank())
            seed = collectives.from_first(lambda: seed)
        self.weight = nn.Parameter(_draw(rows, dim, seed))
        self.bias = nn.Parameter(torch.zeros(rows[1] - rows[0])) if bias else None
        self._seen = False

    def set_classes(self, groups: Tensor, counts: Tensor | None = None) -> None:
        """Say which group is which class: [num_classes] different int64, class = place in sorted order.

        `counts` [num_classes]: images of each group, for losses that look at class sizes. By default group = class.
        """
        order = groups.argsort()
        sorted_groups = groups[order].to(self.classes)
        if groups.shape != (self.num_classes,) or (sorted_groups[1:] == sorted_groups[:-1]).any():
            raise ValueError(f"classes: expected {self.num_classes} different groups, got {len(torch.unique(groups))}")
        if counts is not None and counts.shape != groups.shape:
            raise ValueError(f"classes: expected {self.num_classes} counts, got {list(counts.shape)}")
        self.classes.copy_(sorted_groups)
        self._set_counts(None if counts is None else counts[order].to(self.classes))

    def compute(self, x: Tensor, batch: Joined, parameters: Sequence[Tensor]) -> Found:
        if x.shape[1] > self.dim:
            raise ValueError(f"loss.dim: centres of {self.dim} numbers cannot meet vectors of {x.shape[1]}; set it to that")
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            used = unit(leaf) if self.cosine else leaf
        everyone, label = collectives.gather(used.detach(), batch.num_rows), self._labels(batch)  # [G, D], [G]
        kept = (label >= 0).nonzero()[:, 0]
        first, end = self._borders(collectives.rank())
        samples = Samples(
            everyone[kept],
            label[kept],
            first,
            end - first,
            max(b - a for a, b in map(self._borders, range(collectives.world()))),
            batch.chunk_bytes,
            batch.with_stats,
        )
        own = slice(0, None) if self.sharded else slice(*self._rows(collectives.rank()))
        with torch.enable_grad():
            stored = self.weight.detach()[own].requires_grad_()
            centres = stored[:, : x.shape[1]].to(x.dtype)
            centres = unit(centres) if self.cosine else centres
        bias = None if self.bias is None else self.bias.detach()[own].to(x.dtype)
        share = self.compare(samples, centres.detach(), bias)
        grad_used = collectives.scatter_sum(torch.zeros_like(everyone).index_copy_(0, kept, share.grad_x), batch.num_rows)
        grad = torch.autograd.grad(used, leaf, grad_used)[0] * collectives.world()  # DDP averages over ranks
        found = {id(self.weight): torch.autograd.grad(centres, stored, share.grad_centres)[0]}
        if self.bias is not None and share.grad_bias is not None:
            found[id(self.bias)] = share.grad_bias.to(self.bias.dtype)
        grads = [found[id(p)] if self.sharded else self.gather_rows(found[id(p)]) for p in parameters]
        value, stats = _reduced(share)
        stats["num_terms"] = value.new_tensor(len(kept))
        return Found(value.to(x.dtype), grad, grads, stats)

    def compare(self, samples: Samples, centres: Tensor, bias: Tensor | None) -> Share:
        """Value and gradients of samples against this rank's centres [num * per_class, D], without graph.

        Every rank calls it with the same samples, so it may use collectives.
        """
        raise TypeError(f"{type(self).__name__} compares nothing")

    def sharded_parameters(self) -> list[nn.Parameter]:
        """Parameters of which this rank holds a slice only."""
        return list(self.parameters()) if self.sharded else []

    def gather_rows(self, rows: Tensor) -> Tensor:
        """All classes' rows from this rank's, of a parameter or its optimizer's moments. Collective: every rank calls it."""
        sizes = [end - first for first, end in map(self._rows, range(collectives.world()))]
        return collectives.gather(rows.detach().contiguous(), sizes)

    def keep_rows(self, whole: Tensor) -> Tensor:
        """This rank's rows of what `gather_rows` gave."""
        return whole[slice(*self._rows(collectives.rank()))]

    def gather_state(self) -> dict[str, Tensor]:
        """`state_dict` with whole parameters, for any number of ranks. Collective: every rank calls it."""
        sharded = {name for name, _ in self.named_parameters()} if self.sharded else set()
        return {name: self.gather_rows(t) if name in sharded else t for name, t in self.state_dict().items()}

    def load_full(self, state: Mapping[str, Tensor]) -> None:
        """Load what `gather_state` gave, on any number of ranks; a sharded rank keeps its slice."""
        sharded = {name for name, _ in self.named_parameters()} if self.sharded else set()
        self.load_state_dict({name: self.keep_rows(t) if name in sharded else t for name, t in state.items()})

    def _set_counts(self, counts: Tensor | None) -> None:
        """Take note of class sizes, in the order of `classes`."""

    def _labels(self, batch: Joined) -> Tensor:
        """Class of every row of all ranks, -1 for rows that are not valid or of no class.  [G]"""
        group = collectives.gather(batch.ids.group, batch.num_rows)
        valid = collectives.gather(batch.ids.valid, batch.num_rows) == 1
        label = torch.searchsorted(self.classes, group.contiguous()).clamp_max(self.num_classes - 1)
        known = valid & (self.classes[label] == group)
        if not self._seen and bool(valid.any()):  # waits for the device once
            if not bool(known.any()):
                raise ValueError(
                    f"no image of this batch belongs to one of the {self.num_classes} classes, "
                    f"groups {int(self.classes[0])} to {int(self.classes[-1])}; give set_classes the groups to train on"
                )
            self._seen = True
        return label.masked_fill(~known, -1)

    def _borders(self, rank: int) -> tuple[int, int]:
        world = collectives.world()
        return self.num_classes * rank // world, self.num_classes * (rank + 1) // world

    def _rows(self, rank: int) -> tuple[int, int]:
        first, end = self._borders(rank)
        return first * self.per_class, end * self.per_class


def _draw(rows: tuple[int, int], dim: int, seed: int) -> Tensor:
    """Rows [first, end) of a random matrix, each about of unit length; a row is the same whatever the slice."""
    first, end = rows
    parts = [torch.empty(0, dim)]
    for block in range(first // BLOCK, -(-end // BLOCK)):
        start = block * BLOCK
        drawn = torch.randn(BLOCK, dim, generator=torch.Generator().manual_seed(seed + block)) / dim**0.5
        parts.append(drawn[max(first - start, 0) : end - start])
    return torch.cat(parts)


def _reduced(share: Share) -> tuple[Tensor, Stats]:
    stats = share.stats or {}
    numbers = torch.cat([share.value.double().view(1), *(pair.double() for pair in stats.values())])
    summed = collectives.total(numbers)
    pairs = summed[1:].view(-1, 2)
    return summed[0], {name: pair[0] / pair[1].clamp_min(1) for name, pair in zip(stats, pairs, strict=True)}
