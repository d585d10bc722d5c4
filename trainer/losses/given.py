"""Losses over the records' own pairs and triplets: nothing is mined, no candidate comes from elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from trainer import collectives
from trainer.distance import Distance, safe_sqrt
from trainer.family import Found, Joined
from trainer.hardness import kinds, shares
from trainer.ids import Ids
from trainer.losses.elementwise import Elementwise
from trainer.rows import Terms, fraction

NEEDS = {
    1: "pairs: records with a row of view 0 and one of view 1",
    2: "triplets: records with rows of view 0 (anchor), 1 (positive) and 2.. (explicit negatives)",
}


class Given(Elementwise):
    """A loss over the records as they are, pairs or triplets by `last_view`.

    Raises ValueError at the first batch in which no record of any rank is one.
    """

    last_view = 1

    def __init__(self) -> None:
        super().__init__()
        self._seen = False

    def compute(self, x: Tensor, batch: Joined, parameters: Sequence[Tensor]) -> Found:
        if not self._seen and sum(batch.num_rows) > 0:  # waits for the device once
            *_, exists = tuples(batch.ids, self.last_view)
            if not int(collectives.total(exists.sum())):
                raise ValueError(f"the loss compares given {NEEDS[self.last_view]}; this batch has none")
            self._seen = True
        return super().compute(x, batch, parameters)

    def rows(self, ids: Ids) -> tuple[Tensor, Tensor, Tensor]:
        """Anchor and positive of every row that ends a pair or triplet, and which rows do, all valid.  [n] each"""
        anchor, positive, exists = tuples(ids, self.last_view)
        valid = ids.valid == 1
        return anchor, positive, exists & valid & valid[anchor] & valid[positive]


class GivenContrastive(Given):
    """y d^2 + (1 - y) max(margin - d, 0)^2 over pairs (views 0 and 1), y = match; `power: 1` without the squares.

    `half` multiplies by 1/2, `legacy` (power 2) makes the second part max(margin - d^2, 0), `weight` is that of matching
    and of other pairs. Mean over pairs. Caffe's ContrastiveLoss is `half`, `margin: 1` on raw vectors; tf.contrastive_loss
    lacks the half; Hadsell et al. 2006, eq. 4, write y inverted; `power: 1` is the linear pairwise ranking loss.
    """

    def __init__(
        self,
        margin: float = 1.0,
        distance: Distance = "euclidean",
        power: Literal[1, 2] = 2,
        half: bool = False,
        legacy: bool = False,
        weight: tuple[float, float] = (1.0, 1.0),
    ) -> None:
        super().__init__()
        if legacy and power != 2:
            raise ValueError("loss.legacy: max(margin - d^2, 0) belongs to power 2, got power 1")
        self.margin, self.power, self.legacy, self.weight = margin, power, legacy, weight
        self.factor = 0.5 if half else 1.0
        self.distance: Distance = distance

    def terms(self, x: Tensor, batch: Joined) -> Terms:
        anchor, _, exists = self.rows(batch.ids)
        similar = batch.ids.match == 1
        d = distance(x[anchor], x, self.distance)  # [n]
        far = F.relu(self.margin - d * d) if self.legacy else F.relu(self.margin - d) ** self.power
        terms = torch.where(similar, self.weight[0] * d**self.power, self.weight[1] * far) * self.factor
        stats = {
            "positive_distance": pair(d, exists & similar),
            "negative_distance": pair(d, exists & ~similar),
            "active_fraction": fraction(terms.detach() > 0, exists),
        }
        return Terms(masked_sum(terms, exists), exists.sum(), stats)


class GivenTriplet(Given):
    """max(0, d_ap - d_an + margin), one term per explicit negative (view 2..) of a record; no group is looked at.

    `p` and `eps` (added to the difference) as in torch's pairwise distance, for euclidean distances; `swap` takes the
    distance between positive and negative where that is smaller (Balntas et al. 2016); `half` multiplies by 1/2;
    `soft`: softplus(d_ap - d_an). torch's TripletMarginLoss is `margin: 1` on raw vectors; FaceNet's (Schroff et al. 2015,
    eq. 3) is `distance: squared_euclidean`; PyCaffe's layer is that with `half` on raw vectors.
    """

    last_view = 2

    def __init__(
        self,
        margin: float = 0.2,
        distance: Distance = "euclidean",
        p: float = 2.0,
        eps: float = 1e-6,
        swap: bool = False,
        half: bool = False,
        soft: bool = False,
    ) -> None:
        super().__init__()
        if p < 1:
            raise ValueError(f"loss.p: a norm needs at least 1, got {p}")
        if p != 2 and distance != "euclidean":
            raise ValueError(f"loss.p: only for distance euclidean, got p {p} with {distance}")
        self.margin, self.p, self.eps, self.swap, self.soft = margin, p, eps, swap, soft
        self.factor = 0.5 if half else 1.0
        self.distance: Distance = distance

    def terms(self, x: Tensor, batch: Joined) -> Terms:
        anchor, positive, exists = self.rows(batch.ids)
        d_ap, d_an = self.distances(x, anchor, positive)
        gap = d_ap - d_an
        terms = (F.softplus(gap) if self.soft else F.relu(gap + self.margin)) * self.factor
        stats = {
            "positive_distance": pair(d_ap, exists),
            "negative_distance": pair(d_an, exists),
            "active_fraction": fraction(terms.detach() > 0, exists),
            **shares(kinds(d_ap.detach(), d_an.detach(), self.margin), exists),
        }
        return Terms(masked_sum(terms, exists), exists.sum(), stats)

    def distances(self, x: Tensor, anchor: Tensor, positive: Tensor) -> tuple[Tensor, Tensor]:
        """d_ap and d_an of every row as a negative.  [n] each"""
        d_ap, d_an = self._between(x[anchor], x[positive]), self._between(x[anchor], x)
        if self.swap:
            d_an = torch.minimum(d_an, self._between(x[positive], x))
        return d_ap, d_an

    def _between(self, a: Tensor, b: Tensor) -> Tensor:
        return F.pairwise_distance(a, b, self.p, self.eps) if self.distance == "euclidean" else distance(a, b, self.distance)


def tuples(ids: Ids, last_view: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of view 0 and 1 of every row's record, and whether the row ends a tuple with them.  [n] each

    A row ends one when its view is `last_view`, or above for triplets, and both were found. Does not wait for the device.
    """
    anchor, has_anchor = _row_of_view(ids, 0)
    positive, has_positive = _row_of_view(ids, 1)
    ends = ids.view == 1 if last_view == 1 else ids.view >= last_view
    return anchor, positive, ends & has_anchor & has_positive


def distance(a: Tensor, b: Tensor, kind: Distance) -> Tensor:
    """Row by row, [n, D] and [n, D] -> [n]; the square root is safe at 0 in value and in gradient."""
    if kind == "cosine":
        return 1 - (a * b).sum(1)
    squared = (a - b).square().sum(1)
    return squared if kind == "squared_euclidean" else safe_sqrt(squared)


def masked_sum(terms: Tensor, exists: Tensor) -> Tensor:
    """Sum of terms [n] where they exist; the gradient of the others is 0, also where they are not finite."""
    return terms.where(exists, terms.new_zeros(())).sum()


def pair(values: Tensor, of: Tensor) -> Tensor:
    """Statistic (sum, count) of values [n] over the mask `of`.  [2]"""
    values = values.detach()
    return torch.stack([values.where(of, values.new_zeros(())).sum().double(), of.sum().double()])


def _row_of_view(ids: Ids, view: int) -> tuple[Tensor, Tensor]:
    """For every row the row of its record with that view, and whether there is one.  [n] each"""
    if not len(ids.record):
        return ids.record, ids.record.bool()
    # Rows of another view sort behind all records, as if theirs were the largest number.
    key = ids.record.masked_fill(ids.view != view, torch.iinfo(torch.int64).max)
    key, order = key.sort(stable=True)
    place = torch.searchsorted(key, ids.record.contiguous()).clamp_max(len(key) - 1)
    return order[place], key[place] == ids.record
