"""What a run writes while it trains: its metrics and its checkpoints."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from cluster.journal import Journal
from cluster.resume import identity
from cluster.runfolder import MetricsFile, note_hash
from cluster.system import System
from configs.schema import RunConfig
from trainer import checkpoints, collectives, reproducible, state
from trainer.checkpoints import About, Snapshot
from trainer.stores import Store
from trainer.writer import Writer


class Saving:
    """The hooks `log` and `save` of the loop. Every rank has one, the first writes. To be left as a context."""

    def __init__(
        self,
        config: RunConfig,
        training: state.Training,
        store: Store,
        metrics: MetricsFile,
        sources: Sequence[Mapping[str, Any]],
        *,
        hashes: Path,
    ) -> None:
        """hashes: file for the weights' hashes of a reproducible run."""
        self._config, self._training, self._store = config, training, store
        self._hashes = hashes
        self._sources, self._first = sources, collectives.rank() == 0
        self._writer = Writer(self._write)
        self._evaluated: tuple[int, dict[str, float]] = (-1, {})
        self._waited: float | None = None
        self._journal = Journal(metrics, System(training.device))
        self._logged: float | None = None

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Hand on to the metrics, with how long training stood still for the log before this one.

        At the first time after a checkpoint also how long it stood still for that.
        """
        began = time.perf_counter()
        evaluated = {name.removeprefix("val/"): value for name, value in values.items() if name.startswith("val/")}
        if evaluated:
            self._evaluated = step, evaluated
        if self._waited is not None:
            values = {**values, "train/checkpoint_wait_s": self._waited}
            self._waited = None
        if not self._first:
            return
        if self._logged is not None:
            values = {**values, "train/log_s": self._logged}
        self._journal.put(step, values)
        self._logged = time.perf_counter() - began

    def save(self, step: int, position: int) -> None:
        """Copy the state; a thread writes it. Collective: every rank calls it, and gets what went wrong with the last one."""
        began = time.perf_counter()
        self._wait()
        taken = state.snapshot(self._training)
        if self._config.train.reproducible:
            weights = reproducible.hash_of(taken.modules)
            reproducible.refuse_unequal(weights, step, self._training.device)
            if self._first:
                note_hash(self._hashes, step, weights)
        if self._first:
            at, metric = self._evaluated
            settings = identity(self._config)
            about = About(step, position, settings, self._sources, metric if at == step else {})
            self._writer.submit(taken, about)
        self._waited = (self._waited or 0.0) + time.perf_counter() - began

    def _write(self, taken: Snapshot, about: About) -> None:
        best_by = self._config.tracking.promote.metric if self._config.train.keep_best else None
        checkpoints.save(self._store, taken, about, keep=self._config.train.keep, best_by=best_by)

    def _wait(self) -> None:
        collectives.from_first(self._written)  # so that all ranks stop together

    def _written(self) -> None:
        self._journal.flush()
        self._writer.wait()

    def __enter__(self) -> Saving:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        try:
            if kind is None:
                self._wait()
            elif self._first:
                with suppress(OSError):  # what brought us here says more
                    self._journal.flush()
        finally:
            self._writer.__exit__(kind, *rest)
