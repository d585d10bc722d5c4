"""Which rows of which shards stand where in the stream that a run reads: every source's own order, mixed by weight."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from configs.schema import Data
from pipelines.growth import History, cut, weights_of
from pipelines.hashing import Int64s, hash_ints
from pipelines.manifest import Manifest
from pipelines.mixture import parts_of
from pipelines.order import Order
from pipelines.quotas import Quotas

_TAG_SOURCE = 32


@dataclass(frozen=True, slots=True)
class Slots:
    """U places of the stream: K rows of a shard each, K = 1 for records."""

    epoch: Int64s  # [U] of the source's own
    shard: Int64s  # [U] number in the whole mixture
    rows: Int64s  # [U, K]
    valid: NDArray[np.bool_]  # [U, K] False for duplicates that fill a unit up


class MixedOrder:
    """The endless order over all sources. A position counts records, or units of K rows with `data.per_class`.

    Of any positions [P, P + B) each source has a stretch of its own order, so that the sources' orders do not depend on
    each other. The first source has the order that it would have alone.
    """

    def __init__(self, manifest: Manifest, data: Data, *, seed: int, histories: Sequence[History]) -> None:
        self._quotas = Quotas(weights_of(manifest))
        self._sources: list[_SourceOrder] = []
        first = 0
        for number, (part, history) in enumerate(zip(parts_of(manifest), histories, strict=True)):
            own = seed if number == 0 else int(hash_ints(seed, _TAG_SOURCE, number)[0] >> np.uint64(1))
            self._sources.append(_SourceOrder(part, data, seed=own, history=history, first_shard=first))
            first += len(part.sizes)

    def slice(self, position: int, batch: int, rank: int = 0, world: int = 1, piece: int = 1) -> Slots:
        """This rank's part of the positions [position, position + batch), sorted by source and then as Order sorts.

        The sorted batch is cut between ranks only where `piece` positions end.
        """
        pieces = -(-batch // piece)
        first, last = (min(batch, piece * (pieces * r // world)) for r in (rank, rank + 1))
        begins, ends = self._quotas.before([position, position + batch]).tolist()
        found: list[Slots] = []
        passed = 0
        for source, begin, end in zip(self._sources, begins, ends, strict=True):
            found += source.part(begin, end, first - passed, last - passed)
            passed += end - begin
        if len(found) == 1:
            return found[0]
        fields = [np.concatenate([getattr(slots, name) for slots in found]) for name in ("epoch", "shard", "rows", "valid")]
        return Slots(*fields)


class _SourceOrder:
    """One source's order: that of its first shards, and from a stage's border on that of more of them."""

    def __init__(self, part: Manifest, data: Data, *, seed: int, history: History, first_shard: int) -> None:
        self._units = None if data.per_class is None else cut(part, data, seed=seed)
        self._first_shard, self._stages = first_shard, history.stages
        sizes = part.sizes if self._units is None else self._units.sizes
        settings = {"seed": seed, "lanes": data.lanes, "window": data.window}
        self._orders = [Order(sizes[: stage.num_shards], **settings) for stage in history.stages]

    def part(self, begin: int, end: int, first: int, last: int) -> Iterator[Slots]:
        """Elements [first, last) of the sorted positions [begin, end) of this source; some of them may be outside."""
        borders = [stage.first for stage in self._stages[1:]]
        for stage, order, start, stop in zip(self._stages, self._orders, [0, *borders], [*borders, end], strict=True):
            start, stop = max(start, begin), min(stop, end)
            count = max(0, stop - start)
            if max(first, 0) < min(last, count):
                place = start - stage.first + stage.first_epoch * order.num_samples  # so that epochs are counted on
                yield self._cut(*order.part(place, count, max(first, 0), min(last, count)))
            first, last = first - count, last - count

    def _cut(self, epoch: Int64s, shard: Int64s, unit: Int64s) -> Slots:
        if self._units is None:
            return Slots(epoch, shard + self._first_shard, unit[:, None], np.ones((len(unit), 1), dtype=np.bool_))
        return Slots(epoch, shard + self._first_shard, *self._units.rows(epoch, shard, unit))
