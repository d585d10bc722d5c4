"""Writes rows of metrics in a thread, so that no step waits for a disk, or for another thread that has Python's lock."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Mapping

from cluster.runfolder import MetricsFile
from cluster.system import System


class Journal:
    """Appends rows with the machine's numbers to `metrics`, in order, with the time at which they were put.

    What a kill takes from the queue is made again: `flush` before a checkpoint is written, and no checkpoint is ahead.
    """

    def __init__(self, metrics: MetricsFile, system: System) -> None:
        self._metrics, self._system = metrics, system
        self._rows: queue.SimpleQueue[tuple[int, float, Mapping[str, float]] | threading.Event] = queue.SimpleQueue()
        self._error: OSError | None = None
        self._thread = threading.Thread(target=self._write, name="nearfar-metrics", daemon=True)

    def put(self, step: int, values: Mapping[str, float]) -> None:
        """Returns at once; `flush` tells what went wrong."""
        if not self._thread.is_alive():
            self._thread.start()
        self._rows.put((step, time.time(), values))

    def flush(self) -> None:
        """Wait until all rows are in the file. Raises the OSError of the first that could not be written."""
        if self._thread.is_alive():
            written = threading.Event()
            self._rows.put(written)
            written.wait()
        if self._error is not None:
            raise self._error

    def _write(self) -> None:
        while True:
            row = self._rows.get()
            if isinstance(row, threading.Event):
                row.set()
            elif self._error is None:  # none after one that is missing: a resumed run writes both
                step, at, values = row
                try:
                    self._metrics.append(step, {**values, **self._system.read()}, at=at)
                except OSError as error:
                    self._error = error
