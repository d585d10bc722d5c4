"""What is measured: forward and backward of a loss, ours and others', searches and evaluations, ready to be called."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from configs import registry
from configs.evaluation import expand
from trainer.distance import Distance
from trainer.engine import Candidates, Pass, Settings, Sums
from trainer.evaluate import Embedded
from trainer.family import Joined
from trainer.ids import Ids
from trainer.measurement import measure
from trainer.neighbours import Gallery, Hidden
from trainer.objective import Objective, build_objective
from trainer.rows import RowLoss, Rows, Terms

DIM, PER_CLASS, SPREAD = 256, 4, 1.5
Case = Callable[[], float]


def batch(size: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> tuple[Tensor, Tensor]:
    """Unit vectors [size, DIM] in noisy classes of PER_CLASS that partly overlap, and their class numbers."""
    generator = torch.Generator().manual_seed(size)
    group = torch.arange(size) // PER_CLASS
    centres = torch.randn(size // PER_CLASS + 1, DIM, generator=generator)
    x = centres[group] + SPREAD * torch.randn(size, DIM, generator=generator)
    return F.normalize(x).to(device=device, dtype=dtype), group.to(device)


def row_losses() -> dict[str, dict[str, Any]]:
    """Every registered row loss, with every miner that it has: label -> config."""
    found: dict[str, dict[str, Any]] = {}
    for name in registry.PARTS["loss"]:
        function = registry.resolve("loss", name)
        hints = typing.get_type_hints(function.__init__ if inspect.isclass(function) else function)
        for miner in _names(hints.get("miner")):
            loss = {"name": name} if miner is None else {"name": name, "miner": miner}
            if isinstance(_objective(loss).loss, RowLoss):
                found[name if miner is None else f"{name} {miner}"] = loss
    return found


class PlainSimilarities(RowLoss):
    """A loss as a user writes it: plain operations on all negatives, differentiated by autograd."""

    def forward(self, rows: Rows) -> Terms:
        return Terms(F.softplus(10 * (rows.negatives() - 0.5)).sum(), rows.num_negatives.sum())


class PlainDistances(RowLoss):
    """The same for a hinge of distances."""

    def __init__(self, kind: Distance) -> None:
        super().__init__()
        self.kind: Distance = kind

    def forward(self, rows: Rows) -> Terms:
        return Terms(F.relu(1.0 - rows.negative_distances(self.kind)).sum(), rows.num_negatives.sum())


def plain_losses() -> dict[str, RowLoss]:
    return {
        "your own: softplus(similarity)": PlainSimilarities(),
        "your own: relu(1 - squared distance)": PlainDistances("squared_euclidean"),
        "your own: relu(1 - distance)": PlainDistances("euclidean"),
    }


def _names(hint: Any) -> list[str | None]:
    """What a Literal, or a union with one, can be; [None] for anything else."""
    if typing.get_origin(hint) is typing.Literal:
        return list(typing.get_args(hint))
    return [name for part in typing.get_args(hint) for name in _names(part) if name is not None] or [None]


def _objective(loss: dict[str, Any] | RowLoss) -> Objective:
    """As training builds it, for vectors of DIM numbers; class centres for 1000 classes."""
    if isinstance(loss, RowLoss):
        return Objective(loss)
    objective = build_objective(loss, dim=DIM, groups=torch.arange(1000), counts=torch.full((1000,), PER_CLASS))
    assert isinstance(objective, Objective)
    return objective


def ours(loss: dict[str, Any] | RowLoss, size: int, stats: bool = False, device: str = "cpu", dtype: str = "float32") -> Case:
    """A loss of this project over one process's batch; statistics as between logged steps, off."""
    x, group = batch(size, getattr(torch, dtype), device)
    objective = _objective(loss).to(device)
    view = (torch.arange(size, device=device) % PER_CLASS > 0).long()
    x.requires_grad_()

    def run() -> float:
        x.grad = None
        value, _ = objective(x, group, view=view, with_stats=stats)
        value.backward()
        return float(value.detach())

    return run


def gemms(size: int, device: str = "cpu", dtype: str = "float32") -> Case:
    """The three matrix products that any such loss needs, into memory that is there: X X^T, S X, S^T X."""
    x, _ = batch(size, getattr(torch, dtype), device)
    s, y = x.new_empty(size, size), torch.empty_like(x)

    def run() -> float:
        torch.mm(x, x.T, out=s)
        torch.mm(s, x, out=y)
        torch.mm(s.T, x, out=y)
        return float(y[0, 0])

    return run


def theirs(name: str, size: int, device: str = "cpu") -> Case:
    """pytorch-metric-learning's loss and miner of the same name, as its documentation builds them."""
    from pytorch_metric_learning import distances, losses, miners

    x, group = batch(size, device=device)
    x.requires_grad_()
    euclidean = distances.LpDistance()
    triplet = losses.TripletMarginLoss(margin=0.2, distance=euclidean)
    loss = losses.SupConLoss(temperature=0.1) if name == "sup_con" else triplet
    miner = {
        "batch_hard": lambda: miners.BatchHardMiner(distance=euclidean),
        "semi_hard": lambda: miners.TripletMarginMiner(margin=0.2, distance=euclidean, type_of_triplets="semihard"),
    }.get(name, lambda: None)()

    def run() -> float:
        x.grad = None
        value = loss(x, group, miner(x, group) if miner is not None else None)
        value.backward()
        return float(value.detach())

    return run


def one_rank(loss: dict[str, Any], world: int, size: int) -> Case:
    """What one of `world` ranks of `size` rows computes and holds: the engine with all candidates at hand, without the wire."""
    mine, group = batch(size)
    others = batch(max(size * (world - 1), PER_CLASS))[0][: size * (world - 1)]
    row = torch.arange(world * size)
    ones = torch.ones_like(row)
    ids = Ids(group.repeat(world) + row // size * size, row, 0 * row, row, ones, ones)
    part = _objective(loss).loss
    assert isinstance(part, RowLoss)

    def run() -> float:
        candidates = Candidates.sort(torch.cat([mine, others]), ids, None)
        joined = Joined(ids.select(row[:size]), [size] * world, with_stats=False)
        sums = Sums(mine, len(row), list(part.parameters()))
        sums.add(part, Pass(row[:size], candidates, mutual=True), joined, Settings(norms=False, first=0))
        return float(sums.numbers[0] / sums.numbers[1])

    return run


def nearest(size: int, queries: int, k: int, dim: int = 128) -> Callable[[], Tensor]:
    """The first `queries` of vectors [size, dim] searched among all others: rows of the k nearest [queries, k]."""
    x = F.normalize(torch.randn(size, dim, generator=torch.Generator().manual_seed(size)))
    gallery = Gallery(x)

    def run() -> Tensor:
        blocks = torch.split(torch.arange(min(queries, size)), gallery.rows(k))
        return torch.cat([gallery.nearest(x[rows], k, Hidden(own=rows)).row for rows in blocks])

    return run


def evaluation(size: int, families: list[str], dim: int = 128) -> Case:
    """The metrics of noisy classes of PER_CLASS, with intervals."""
    x, group = batch(size)
    row = torch.arange(size)
    found = Embedded(F.normalize(x[:, :dim]), group, torch.stack([row * 0, row, row * 0], dim=1))
    return lambda: float(len(measure(found, expand(families), resamples=1000).values))
