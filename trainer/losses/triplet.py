"""Triplet loss: with triplets mined from the whole global batch, or with those the records give."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from trainer import mining
from trainer.distance import Distance
from trainer.family import Family
from trainer.hardness import shares_of_all
from trainer.losses.given import GivenTriplet
from trainer.losses.hinges import all_hinges
from trainer.losses.known import known, through_distance_
from trainer.rows import RowLoss, Rows, Terms, fraction

Miner = Literal["all", "batch_hard", "semi_hard", "semi_hard_within_margin", "hardest", "random_hard", "distance_weighted"]
MeanOver = Literal["active", "all"]
Pairs = Literal["ordered", "unordered"]
Pick = Literal["closest", "random"]


def triplet(
    miner: Miner | None = None,
    margin: float = 0.2,
    distance: Distance = "euclidean",
    soft: bool = False,
    mean_over: MeanOver | None = None,
    pairs: Pairs = "ordered",
    pick: Pick = "closest",
    p: float = 2.0,
    eps: float = 1e-6,
    swap: bool = False,
    half: bool = False,
) -> RowLoss | Family:
    """Without `miner` the records' own triplets: `margin, distance, soft, p, eps, swap, half`; see GivenTriplet.

    With one: `margin, distance, soft, mean_over, pairs, pick`; see Triplet. Raises ValueError for an option of the other.
    """
    given = {"p": p != 2.0, "eps": eps != 1e-6, "swap": swap, "half": half}
    mined = {"mean_over": mean_over is not None, "pairs": pairs != "ordered", "pick": pick != "closest"}
    for name, is_set in (given if miner else mined).items():
        if is_set:
            what = f"belongs to given triplets; leave it out or drop miner {miner!r}" if miner else "needs a miner; name one"
            raise ValueError(f"loss.{name}: {what}")
    if miner is not None:
        return Triplet(miner, margin, distance, soft, mean_over, pairs, pick)
    return GivenTriplet(margin, distance, p, eps, swap, half, soft)


class Triplet(RowLoss):
    """max(0, d_ap - d_an + margin), or softplus(d_ap - d_an) with `soft`, over triplets chosen by `miner`.

    - `all`: every (anchor, positive, negative); the mean is over those with a hinge above 0 (omoindrot's batch_all).
    - `batch_hard`: each anchor's farthest positive and closest negative, one term per anchor that has both (Hermans et al.
      2017, eq. 5).
    - `semi_hard`: for each (anchor, positive) the closest negative farther than the positive, else the farthest (Schroff et
      al. 2015, as TensorFlow computes it); `semi_hard_within_margin`: only d_ap < d_an < d_ap + margin, `pick` of those.
    - `hardest`, `random_hard`: for each (anchor, positive) the closest, or any, negative whose hinge is above 0.
    - `distance_weighted`: for each (anchor, positive) a negative as Wu et al. 2017 draw it.

    `mean_over`: all terms, or active ones (default for `all`). `pairs: unordered`: (a, p) and (p, a) count once.
    """

    def __init__(
        self,
        miner: Miner,
        margin: float = 0.2,
        distance: Distance = "euclidean",
        soft: bool = False,
        mean_over: MeanOver | None = None,
        pairs: Pairs = "ordered",
        pick: Pick = "closest",
    ) -> None:
        super().__init__()
        if miner == "batch_hard" and pairs == "unordered":
            raise ValueError("loss.pairs: batch_hard has one term per anchor, not per pair; leave it out or take `hardest`")
        self.miner, self.margin, self.soft, self.pick = miner, margin, soft, pick
        self.active_only = (mean_over or ("active" if miner == "all" else "all")) == "active"
        self.ordered = pairs == "ordered"
        self.distance: Distance = distance
        self.temporaries = {"distance_weighted": 6, "batch_hard": 4, "semi_hard": 4, "hardest": 4}.get(miner, 5)

    def forward(self, rows: Rows) -> Terms:
        if self.miner not in ("batch_hard", "hardest"):
            mining.pack_(rows)
        hardness = shares_of_all(rows, self.distance, self.margin) if rows.with_stats else {}
        if self.miner == "all":
            return self._all(rows, hardness)
        positives, negatives, exists = self.mine(rows)
        if not self.ordered:
            exists = exists & mining.counted_here(rows, positives)
        d_ap, d_an = rows.distance_at(positives, self.distance), rows.distance_at(negatives, self.distance)
        if self.miner in ("hardest", "random_hard"):
            exists = exists & (d_ap - d_an + self.margin > 0)
        zero = d_ap.new_zeros(())
        gap = d_ap.where(exists, zero) - d_an.where(exists, zero)  # cut before any arithmetic: the rest may be infinite
        terms = (F.softplus(gap) if self.soft else F.relu(gap + self.margin)).where(exists, zero)
        active = terms.detach() > 0
        count = (active if self.active_only else exists).sum()
        return Terms(terms.sum(), count, {"active_fraction": fraction(active, exists), **hardness})

    @torch.no_grad()
    def mine(self, rows: Rows) -> tuple[Tensor, Tensor, Tensor]:
        """Columns of positives and negatives and whether there is a triplet, [q, k] each."""
        kind, positives = self.distance, rows.positives
        if self.miner == "batch_hard":
            positives, has_positive = mining.hardest_positive(rows, kind)  # [q, 1]
            negatives, has_negative = mining.hardest_negative(rows, kind)
            exists = has_positive & has_negative
        elif self.miner == "semi_hard":
            negatives, exists = mining.semi_hard(rows, kind)
        elif self.miner == "semi_hard_within_margin":
            negatives, exists = mining.semi_hard_within_margin(rows, kind, self.margin, random=self.pick == "random")
        elif self.miner == "hardest":
            columns, has_negative = mining.hardest_negative(rows, kind)
            negatives, exists = columns.expand_as(positives), rows.is_positive & has_negative
        elif self.miner == "random_hard":
            negatives, exists = mining.random_hard(rows, kind, self.margin)
        else:
            negatives, exists = mining.distance_weighted(rows)
        return positives, negatives, exists

    def _all(self, rows: Rows, hardness: dict[str, Tensor]) -> Terms:
        exists = rows.is_positive
        if not self.ordered:
            exists = exists & mining.counted_here(rows, rows.positives)
        d_ap = rows.distance_at(rows.positives, self.distance)  # [q, P]
        with torch.no_grad():
            far = mining.distances(rows, self.distance)  # [q, G]
            num_negatives = rows.num_negatives[:, None]
            bound = (d_ap + (0 if self.soft else self.margin)).masked_fill(~exists, -torch.inf)
            total, by_near, by_far = all_hinges(bound, far, soft=self.soft)
            num_all = (num_negatives * exists).sum().double()
            num_active = num_all if self.soft else by_near.double().sum()
            gradients = [(d_ap, by_near), *through_distance_(rows, self.distance, by_far, far)]
        stats = {"fraction_positive": torch.stack([num_active, num_all]), **hardness}
        return Terms(known(total, gradients), num_active if self.active_only else num_all, stats)
