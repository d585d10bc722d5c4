"""Who searches among whom, and how much each has to find."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.neighbours import Hidden


@dataclass(frozen=True, slots=True)
class Protocol:
    """Queries [Q, D] with their groups [Q], searched in a gallery [G, D] with groups [G].

    `same`: the gallery is the queries themselves, in this order, and no query finds itself. `part` [Q] and `gallery_part`
    [G] are set where queries must not find what has the same part: `only_class` hides of those the query's own class alone.
    `own` [Q]: another gallery's row that is the query itself, and of its group, -1 for none; it is not found either.
    """

    vectors: Tensor
    group: Tensor
    gallery: Tensor
    gallery_group: Tensor
    same: bool = True
    part: Tensor | None = None
    gallery_part: Tensor | None = None
    only_class: bool = False
    own: Tensor | None = None

    @property
    def hidden(self) -> Hidden:
        """What each query may not find."""
        if self.part is None or self.gallery_part is None:
            return Hidden(own=torch.arange(len(self.group), device=self.group.device) if self.same else self.own)
        if not self.only_class:
            return Hidden(own=self.own, key=self.part, gallery_key=self.gallery_part)  # a query hides itself, too
        key, gallery_key = _joined(self)
        return Hidden(own=self.own, key=key, gallery_key=gallery_key)

    def relevant(self) -> Tensor:
        """[Q] how many rows of its class every query can find."""
        there = count_in(self.group, self.gallery_group)
        if self.part is not None:
            return there - count_in(*_joined(self)) - self._itself()
        return there - 1 if self.same else there - self._itself()

    def searched(self) -> Tensor:
        """[Q] how many rows every query can find at all."""
        hidden = self.hidden
        if hidden.key is None or hidden.gallery_key is None:
            return torch.full_like(self.group, len(self.gallery_group) - self.same) - self._itself()
        return len(self.gallery_group) - count_in(hidden.key, hidden.gallery_key) - self._itself()

    def _itself(self) -> Tensor | int:
        """[Q] 1 where a query is in another gallery, and not hidden there for its part anyway."""
        if self.own is None:
            return 0
        there = self.own >= 0
        if self.part is not None and self.gallery_part is not None:
            there = there & (self.part != self.gallery_part[self.own.clamp(min=0)])
        return there.long()


def self_retrieval(vectors: Tensor, group: Tensor) -> Protocol:
    """Each of vectors [N, D] searched among all others."""
    return Protocol(vectors, group, vectors, group)


def count_in(ids: Tensor, among: Tensor) -> Tensor:
    """[Q] how often each of ids [Q] is in `among` [G]."""
    values, counts = torch.unique(among, return_counts=True)
    at = torch.searchsorted(values, ids.contiguous()).clamp(max=len(values) - 1)
    return torch.where(values[at] == ids, counts[at], 0)


def _joined(protocol: Protocol) -> tuple[Tensor, Tensor]:
    """One number for class and part together, of the queries [Q] and of the gallery [G]."""
    assert protocol.part is not None
    assert protocol.gallery_part is not None
    _, group = torch.unique(torch.cat([protocol.group, protocol.gallery_group]), return_inverse=True)
    part = torch.cat([protocol.part, protocol.gallery_part])
    joined = group * (int(part.max()) + 1) + part
    return joined[: len(protocol.group)], joined[len(protocol.group) :]
