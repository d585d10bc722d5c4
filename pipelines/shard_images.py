"""The images of a data set in shards, in the order of its manifest."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache, partial

import numpy as np

from configs.schema import Augment, Data
from pipelines.fill import Filled, Filler
from pipelines.image_set import Name, Pixels, Span
from pipelines.manifest import Manifest
from pipelines.plan import Plan, plan_records
from pipelines.read import Reader
from pipelines.records import member_names
from pipelines.samples import TARGET

KNOWN_BAD = "the manifest calls this record bad"


class ShardImages:
    """An ImageSet. Every image counts for itself: one that cannot be read does not take its record with it."""

    def __init__(self, location: str, cache: str | None = None) -> None:
        self._manifest = Manifest.open(location, cache=cache)
        self.location, self.kind, self.digest = location, self._manifest.kind, self._manifest.digest
        self.num_records, self.num_images = self._manifest.num_samples, self._manifest.num_images
        self._column = lru_cache(maxsize=8)(self._manifest.column)

    def span(self, number: int, first: int, end: int) -> Span:
        return Span(number, first, end)

    def pixels(self, span: Span, data: Data, batch: int) -> Iterator[Pixels]:
        starts = range(span.first, span.end, batch)
        filler = Filler(
            self._manifest, data, Augment(), (partial(self._plan, start, min(start + batch, span.end)) for start in starts)
        )
        try:
            for filled in filler:
                yield self._named(filled)
        finally:
            filler.close()

    def read(self, record: int, member: str) -> bytes:
        shard = int(np.searchsorted(self._manifest.starts, record, side="right")) - 1
        table, row = self._manifest.table(shard), record - int(self._manifest.starts[shard])
        at = int(table.start[row]) + self._members(shard, row).index(member)
        reader = Reader(self._manifest)
        try:
            return reader.read(shard, int(table.offset[at]), int(table.size[at]), int(table.crc32[at]))
        finally:
            reader.close()

    def _plan(self, first: int, end: int) -> Plan:
        index = np.arange(first, end, dtype=np.int64)
        shard = np.searchsorted(self._manifest.starts, index, side="right") - 1
        return plan_records(self._manifest, np.zeros_like(index), shard, index - self._manifest.starts[shard], seed=None)

    def _named(self, filled: Filled) -> Pixels:
        plan = filled.plan
        reasons = {bad.index: bad.reason for bad in filled.bad}
        is_image = np.ones(plan.num_members, np.bool_) if plan.dim is None else plan.dim == 0
        names, told = [], []
        for index in np.flatnonzero(is_image & (plan.view != TARGET)).tolist():
            shard, row = int(plan.shard[index]), int(plan.row[index])
            number = int(self._manifest.starts[shard]) + row
            member = self._members(shard, row)[int(plan.view[index])]
            names.append(Name(number, self._column(shard, "key")[row], self._column(shard, "label")[row], member))
            told.append(reasons.get(index, "") if plan.present[index] else KNOWN_BAD)
        return Pixels(filled.batch.images, names, told)

    def _members(self, shard: int, row: int) -> list[str]:
        """The names of a record's images and vectors, by their `view`."""
        start = self._manifest.table(shard).start
        return member_names(self.kind, int(start[row + 1] - start[row]) - (self._manifest.target_dim > 0))
