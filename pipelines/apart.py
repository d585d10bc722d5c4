"""The loader in processes of its own, beside a rank that trains on a GPU.

Each of the many small calls of a step needs Python's lock, which decoding threads in the same process hold often enough to
halve the speed of a ResNet-50 (measured on an H200); and one process of them decodes 2,500 photos a second at most.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import asdict
from types import TracebackType

from configs.schema import Data
from pipelines.batch import Batch, join
from pipelines.blocks import Counts
from pipelines.growth import History
from pipelines.reader_process import ReaderProcess
from pipelines.tally import OnBad

THREADS_EACH = 4  # more in one process wait for its lock


class LoaderApart:
    """As Loader over `data.train`, and with the same batches: every process loads its share of the rank's."""

    def __init__(
        self,
        data: Data,
        *,
        seed: int,
        rank: int = 0,
        world: int = 1,
        position: int = 0,
        histories: Sequence[History] | None = None,
        on_bad: OnBad | None = None,
        piece: int = 1,
        pinned: bool = False,
    ) -> None:
        """As for Loader, but what that refuses comes with the first batch. `on_bad` is pickled, and called in the processes.

        `pinned`: images come in page-locked memory.
        """
        self.position, self.wait_s = position, 0.0
        self._pinned = pinned
        self._units = data.batch // (data.per_class or 1)
        pieces = math.ceil(self._units / max(1, piece // (data.per_class or 1)))
        count = max(1, min(math.ceil(data.threads / THREADS_EACH), pieces // world))
        share = {name: math.ceil(getattr(data, name) / count) for name in ("threads", "io_threads")}
        own = data.model_copy(update={**share, "decoded_mb": data.decoded_mb / count})
        options = {"seed": seed, "position": position, "histories": histories, "on_bad": on_bad, "piece": piece}
        self._counts: dict[str, float] = {**asdict(Counts()), "bad_images": 0.0}
        self._closed = False
        # Rank r of W is cut at r / W: the shares of ranks r * count + i of W * count, one behind the other, are its own.
        places = range(rank * count, (rank + 1) * count)
        self._processes = [ReaderProcess(own, {**options, "rank": place, "world": world * count}) for place in places]

    def __iter__(self) -> LoaderApart:
        return self

    def __next__(self) -> Batch:
        """Raises what a loader raises, and RuntimeError when one of the processes is gone."""
        if self._closed:
            raise RuntimeError("the loader is closed; make a new one")
        started = time.perf_counter()
        try:
            parts, counts = zip(*[process.receive() for process in self._processes], strict=True)
        except BaseException:
            self.close()
            raise
        batch = join(parts, pinned=self._pinned)
        for process in self._processes:
            process.ask()
        self._counts = {name: sum(count[name] for count in counts) for name in self._counts}
        self.position += self._units
        self.wait_s += time.perf_counter() - started
        return batch

    def __enter__(self) -> LoaderApart:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    @property
    def counts(self) -> dict[str, float]:
        """As Loader's, of all processes."""
        return {**self._counts, "wait_s": self.wait_s}

    def close(self) -> None:
        """End the processes; what they read ahead is forgotten."""
        self._closed = True
        for process in self._processes:
            process.dismiss()
        for process in self._processes:
            process.close()
