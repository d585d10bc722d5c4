"""What a loss mines from a batch: its own miner is asked, nothing is learned."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pipelines.batch import Batch
from trainer import mining
from trainer.backward import compare
from trainer.distance import Distance
from trainer.family import Family, Found, Joined
from trainer.hardness import kinds, shares, shares_of_all
from trainer.losses.given import GivenTriplet, pair
from trainer.losses.triplet import Triplet
from trainer.objective import Objective
from trainer.rows import RowLoss, Rows, Terms

MARGIN: float = 0.2  # of losses without one
DISTANCE: Distance = "euclidean"


@dataclass(frozen=True, slots=True)
class Rules:
    """By what triplets are told apart. `miner` is empty where the closest negative stands for what the loss does itself."""

    loss: str
    miner: str
    margin: float
    distance: str


@dataclass(slots=True)
class Picked:
    """t triplets: rows of the batch and distances.  [t] each"""

    anchor: Tensor
    positive: Tensor
    negative: Tensor
    d_ap: Tensor
    d_an: Tensor

    def kinds(self, margin: float) -> Tensor:
        return kinds(self.d_ap, self.d_an, margin)


@dataclass(frozen=True, slots=True)
class Seen:
    """Shares of the batch's triplets by `hardness` and of the picked ones, mean distances, and the picked ones."""

    batch: dict[str, float]
    picked_shares: dict[str, float]
    mean_d_ap: float
    mean_d_an: float
    picked: Picked


class Watcher:
    """Asks the first triplet loss of an objective, else its first loss, what it mines; nobody can train with it afterwards."""

    def __init__(self, objective: nn.Module) -> None:
        every = [module for module in objective.modules() if isinstance(module, Objective)]
        triplets = [one for one in every if isinstance(one.loss, (Triplet, GivenTriplet))]
        self._objective = (triplets or every)[0]
        self._objective.memory = None  # holds nothing before the first step
        loss = self._objective.loss
        given, mined = isinstance(loss, GivenTriplet), isinstance(loss, Triplet) and loss.miner != "all"
        miner = "given" if given else loss.miner if isinstance(loss, Triplet) and mined else ""
        margin, distance = (loss.margin, loss.distance) if isinstance(loss, (Triplet, GivenTriplet)) else (MARGIN, DISTANCE)
        self.rules = Rules(type(loss).__name__, miner, margin, distance)
        notes: list[Picked] = []
        self._notes = notes
        if isinstance(loss, GivenTriplet):
            self._objective.loss = _WatchedGiven(loss, notes)
        else:
            self._objective.loss = _Watched(loss if isinstance(loss, RowLoss) else None, self.rules, notes)

    @torch.no_grad()
    def __call__(self, vectors: Tensor, batch: Batch) -> Seen:
        """vectors [k, D] of the batch's images, as the encoder gives them; in one process."""
        self._notes.clear()
        _, stats = compare(self._objective, vectors, batch, step=0)
        picked = _join(self._notes, batch)
        own = {name: float(two[0] / two[1].clamp_min(1)) for name, two in self._shares(picked).items()}
        told = {name: float(stats[name]) for name in own}
        return Seen(told, own, float(stats["mean_d_ap"]), float(stats["mean_d_an"]), picked)

    def _shares(self, picked: Picked) -> dict[str, Tensor]:
        return shares(picked.kinds(self.rules.margin), torch.ones_like(picked.anchor, dtype=torch.bool))


class _Watched(RowLoss):
    """Notes (record, view) of what is picked from each chunk of rows; has no terms."""

    def __init__(self, loss: RowLoss | None, rules: Rules, notes: list[Picked]) -> None:
        super().__init__()
        self._rules, self._notes = rules, notes
        self._triplet = loss if isinstance(loss, Triplet) and rules.miner else None
        if loss is not None:
            self.symmetric, self.explicit_for_anchors = loss.symmetric, loss.explicit_for_anchors

    def forward(self, rows: Rows) -> Terms:
        distance: Any = self._rules.distance
        mining.pack_(rows)
        far = mining.distances(rows, distance)
        near = mining.distances(rows, distance, rows.positives)
        stats = {**shares_of_all(rows, distance, self._rules.margin)}
        stats |= {"mean_d_ap": pair(near, rows.is_positive), "mean_d_an": pair(far, far < torch.inf)}
        positives, negatives, exists = self._pick(rows, distance)
        d_ap, d_an = (mining.distances(rows, distance, columns) for columns in (positives, negatives))
        if self._rules.miner in ("hardest", "random_hard"):  # as the loss does: only what violates the margin counts
            exists = exists & (d_ap - d_an + self._rules.margin > 0)
        at = exists.nonzero()
        code = _codes(rows.candidates.record, rows.candidates.view)
        own = _codes(rows.queries.record, rows.queries.view)
        positive, negative = (code[columns[exists]] for columns in (positives, negatives))
        self._notes.append(Picked(own[at[:, 0]], positive, negative, d_ap[exists], d_an[exists]))
        zero = rows.similarity.new_zeros(())
        return Terms(zero, zero, stats)

    def _pick(self, rows: Rows, distance: Distance) -> tuple[Tensor, Tensor, Tensor]:
        if self._triplet is not None:
            positives, negatives, exists = self._triplet.mine(rows)
            if not self._triplet.ordered:
                exists = exists & mining.counted_here(rows, positives)
            return positives, negatives, exists
        column, has_negative = mining.hardest_negative(rows, distance)
        return rows.positives, column.expand_as(rows.positives), rows.is_positive & has_negative


class _WatchedGiven(Family):
    """Notes the given triplets."""

    def __init__(self, loss: GivenTriplet, notes: list[Picked]) -> None:
        super().__init__()
        self._loss, self._notes = loss, notes

    def compute(self, x: Tensor, batch: Joined, parameters: Sequence[Tensor]) -> Found:
        found = self._loss.compute(x, batch, parameters)
        anchor, positive, exists = self._loss.rows(batch.ids)
        d_ap, d_an = self._loss.distances(x, anchor, positive)
        code = _codes(batch.ids.record, batch.ids.view)
        self._notes.append(Picked(code[anchor][exists], code[positive][exists], code[exists], d_ap[exists], d_an[exists]))
        means = {"mean_d_ap": found.stats["positive_distance"], "mean_d_an": found.stats["negative_distance"]}
        return Found(found.value, torch.zeros_like(x), (), {**found.stats, **means})


def _codes(record: Tensor, view: Tensor) -> Tensor:
    """One number for each (record, view), which names a row of the batch."""
    return record * 16 + view


def _join(notes: Sequence[Picked], batch: Batch) -> Picked:
    """All chunks, with rows in place of codes."""
    code, order = _codes(batch.record, batch.view).sort()
    rows = [torch.cat([getattr(note, name) for note in notes]) for name in ("anchor", "positive", "negative")]
    anchor, positive, negative = (order[torch.searchsorted(code, row)] for row in rows)
    d_ap, d_an = (torch.cat([getattr(note, name) for note in notes]) for name in ("d_ap", "d_an"))
    return Picked(anchor, positive, negative, d_ap, d_an)
