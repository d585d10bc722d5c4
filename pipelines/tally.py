"""Counts what could not be read, tells of it once, and stops a run when it is too much."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from typing import Any

from configs.errors import Unrecoverable
from pipelines.fill import Filled
from pipelines.manifest import Manifest

logger = logging.getLogger(__name__)

OnBad = Callable[[dict[str, Any]], None]


class Tally:
    """Of one rank: `images` that were asked for so far, and the `bad` ones among them."""

    def __init__(self, manifest: Manifest, max_bad_fraction: float, on_bad: OnBad | None = None) -> None:
        self.images = self.bad = 0
        self._manifest, self._max_bad_fraction, self._on_bad = manifest, max_bad_fraction, on_bad
        self._told: set[tuple[int, int]] = set()
        self._last: deque[str] = deque(maxlen=3)

    def count(self, filled: Filled) -> None:
        """Take a batch into account. Raises Unrecoverable when the unreadable share is above the limit."""
        self.images += int(filled.plan.present.sum())
        self.bad += len(filled.bad)
        for bad in filled.bad:
            self._tell(filled, bad.index, bad.reason)
        limit = self._max_bad_fraction
        if self.bad > limit * self.images and self.images * limit >= (1 if limit > 0 else 0):
            raise Unrecoverable(
                f"{self.bad} of {self.images} images could not be read, more than data.max_bad_fraction = {limit}; "
                f"the last: {'; '.join(self._last)}. Repair or pack the data again, or raise the limit"
            )

    def _tell(self, filled: Filled, index: int, reason: str) -> None:
        """Report an image the first time it turns up."""
        plan = filled.plan
        shard, row, offset = int(plan.shard[index]), int(plan.row[index]), int(plan.offset[index])
        if (shard, offset) in self._told:
            return
        self._told.add((shard, offset))
        report = {
            "shard": self._manifest.shard_path(shard).name,
            "key": self._manifest.keys(shard)[row],
            "source": self._manifest.sources(shard)[row],
            "offset": offset,
            "reason": reason,
        }
        self._last.append(f"{report['shard']} {report['key']} ({report['source']}): {reason}")
        logger.warning("unreadable image, masked from now on: %s", self._last[-1])
        if self._on_bad is not None:
            self._on_bad(report)
