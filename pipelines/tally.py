"""Counts what could not be read, tells of it once, and stops a run when it is too much."""

from __future__ import annotations

import logging
from collections import Counter, deque
from collections.abc import Callable
from typing import Any

from configs.errors import Unrecoverable
from configs.schema import Data
from pipelines.fill import Filled
from pipelines.manifest import Manifest

logger = logging.getLogger(__name__)

OnBad = Callable[[dict[str, Any]], None]


class Tally:
    """Of one rank: `images` (and vectors) that were asked for so far, and the `bad` ones among them."""

    def __init__(self, manifest: Manifest, data: Data, on_bad: OnBad | None = None) -> None:
        self.images = self.bad = 0
        self._manifest, self._data, self._on_bad = manifest, data, on_bad
        self._told: set[tuple[int, int]] = set()  # (shard, offset)
        self._bad_of: Counter[int] = Counter()  # different images of a shard
        self._last: deque[str] = deque(maxlen=3)

    def count(self, filled: Filled) -> None:
        """Take a batch into account. Raises Unrecoverable when the unreadable share of all, or of one shard, is too large."""
        self.images += int(filled.plan.present.sum())
        self.bad += len(filled.bad)
        for bad in filled.bad:
            self._tell(filled, bad.index, bad.reason)
        self._refuse_too_many()
        for shard in {int(filled.plan.shard[bad.index]) for bad in filled.bad}:
            self._refuse_too_many_of(shard)

    def _refuse_too_many(self) -> None:
        limit = self._data.max_bad_fraction
        if self.bad > limit * self.images and self.images * limit >= (1 if limit > 0 else 0):
            self._stop(f"{self.bad} of {self.images} images", f"data.max_bad_fraction = {limit}")

    def _refuse_too_many_of(self, shard: int) -> None:
        limit, bad, total = self._data.max_bad_shard_fraction, self._bad_of[shard], len(self._manifest.table(shard).uid)
        if bad > limit * total and (bad > 1 or limit == 0):  # one alone says nothing of the shard
            where = self._manifest.shard_file(shard).location
            self._stop(f"{bad} of the {total} images of {where}", f"data.max_bad_shard_fraction = {limit}")

    def _stop(self, how_many: str, limit: str) -> None:
        raise Unrecoverable(
            f"{how_many} could not be read, more than {limit}; "
            f"the last: {'; '.join(self._last)}. Repair or pack the data again, or raise the limit"
        )

    def _tell(self, filled: Filled, index: int, reason: str) -> None:
        """Report an image the first time it turns up."""
        plan = filled.plan
        shard, row, offset = int(plan.shard[index]), int(plan.row[index]), int(plan.offset[index])
        if (shard, offset) in self._told:
            return
        self._told.add((shard, offset))
        self._bad_of[shard] += 1
        report = {
            "shard": self._manifest.shard_file(shard).name,
            "key": self._manifest.keys(shard)[row],
            "source": self._manifest.sources(shard)[row],
            "offset": offset,
            "reason": reason,
        }
        self._last.append(f"{report['shard']} {report['key']} ({report['source']}) at byte {offset}: {reason}")
        logger.warning("unreadable image, masked from now on: %s", self._last[-1])
        if self._on_bad is not None:
            self._on_bad(report)
