"""What every kind of loss answers, and the base of those that are no row losses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn

from trainer.ids import Ids

Stats = dict[str, Tensor]


@dataclass(frozen=True, slots=True)
class Joined:
    """What comes with this rank's vectors x [n, D]."""

    ids: Ids  # [n] each
    num_rows: Sequence[int]  # of every rank, in rank order
    target: Tensor | None = None  # [n, E] a teacher's or frozen space
    seed: int = 0  # of this step, the same on all ranks
    with_stats: bool = True
    chunk_bytes: int = 2**25


@dataclass(frozen=True, slots=True)
class Found:
    """The mean over the terms of all ranks, and its gradients.

    `grad` [n, D] is d value / d x of this rank times the number of ranks, so that DDP's averaging gives the true one;
    `grads` are the true gradients of the parameters, the same on every rank.
    """

    value: Tensor
    grad: Tensor
    grads: Sequence[Tensor] = ()
    stats: Stats = field(default_factory=dict)


class Family(nn.Module):
    """A loss that is not made of rows of similarities: given records, class centres, targets."""

    def compute(self, x: Tensor, batch: Joined, parameters: Sequence[Tensor]) -> Found:
        """Value and gradients for this rank's vectors x [n, D], as they are to be used. Collective: every rank calls it."""
        raise TypeError(f"{type(self).__name__} computes nothing")
