"""A run's life in MLflow, written by a thread of the driver that follows metrics.jsonl and never disturbs training."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

from cluster.description import DatasetRef, Description
from cluster.lock import Lock
from cluster.runfolder import RunFolder
from cluster.sender import IMPATIENT, Sender, Status
from cluster.store import brief, environment, redact, tracking_uri
from configs.schema import RunConfig

logger = logging.getLogger(__name__)

POLL_S = 1.0
LONGEST_DELAY_S = 30.0


class Tracker:
    """Sends one run's params, metrics and artifacts to one MLflow run, found again after any crash.

    `start` returns at once; nothing here raises into training. What has arrived is remembered in RUN/tracking.json,
    so that a later Tracker or `nearfar track sync` goes on from there. Raises ValueError for an impossible `tracking.uri`.
    """

    def __init__(
        self, run: Path, config: RunConfig, *, tags: Mapping[str, str] | None = None, datasets: Sequence[DatasetRef] = ()
    ) -> None:
        self.uri = tracking_uri(config.tracking, run.parent)
        self._folder = RunFolder(run)
        given = os.environ.get("MLFLOW_TRACKING_URI") if config.tracking.uri is None else None
        self._about = Description(dict(tags or {}), tuple(datasets), redact(self.uri) if given else None)
        self._sender = Sender(run, config, self._about, uri=self.uri)
        self._lock = Lock(self._folder.tracking_lock)
        self._opened, self._stop = threading.Event(), threading.Event()
        self._deadline = float("inf")
        self._ending: Status = "FINISHED"
        self._complete = self._silent = False
        self._stack = ExitStack()
        self._thread = threading.Thread(target=self._run, name="nearfar-tracking", daemon=True)

    @property
    def run_id(self) -> str | None:
        """The MLflow run, once there is one."""
        return self._sender.run_id

    def start(self) -> None:
        """Begin to follow RUN/metrics.jsonl in the background."""
        self._stack.enter_context(environment(IMPATIENT))
        self._thread.start()

    def wait(self, timeout_s: float) -> str | None:
        """The id of the MLflow run as soon as it is open, or None when that takes longer than `timeout_s`."""
        self._opened.wait(timeout_s)
        return self.run_id if self._opened.is_set() else None

    def finish(self, status: Status, *, timeout_s: float = 60) -> bool:
        """Send the rest of the metrics, set the status, then send the run's artifacts.

        False when not all of it arrived within `timeout_s`, or before Ctrl-C ended the waiting: a warning tells how to
        send the rest.
        """
        self._ending = status
        self._deadline = time.monotonic() + timeout_s
        self._stop.set()
        try:
            self._thread.join(timeout_s + 1)
        except KeyboardInterrupt:  # what the run is has been decided; only the waiting ends
            self._deadline = 0.0
        self._stack.close()
        if not self._complete:
            run = self._folder.path
            message = "MLflow at %s has not got everything; it is safe in %s, and `nearfar track sync %s` sends it"
            logger.warning(message, redact(self.uri), run, run)
        return self._complete

    def _run(self) -> None:
        try:
            self._follow()
        finally:
            self._lock.release()

    def _follow(self) -> None:
        delay = POLL_S
        while not self._complete:
            stopping = self._stop.is_set()  # read first: what was written before `finish` is then sent below
            try:
                self._step(stopping)
                delay = POLL_S
                self._report(None)
            except Exception as error:  # a thread that dies would lose the rest of the run
                self._report(error)
                delay = min(2 * delay, LONGEST_DELAY_S)
            if time.monotonic() > self._deadline:
                return
            if stopping:
                time.sleep(POLL_S / 4)
            else:
                self._stop.wait(delay)

    def _step(self, stopping: bool) -> None:
        if not self._opened.is_set():
            self._lock.take()
            self._about.write(self._folder.description)
            self._sender.open(running=True)
            self._opened.set()
        self._sender.send()
        if stopping:
            self._sender.close(self._ending)
            self._complete = True

    def _report(self, error: Exception | None) -> None:
        if error is not None and not self._silent:
            where, run = redact(self.uri), self._folder.path
            logger.warning("MLflow at %s: %s; training goes on, its metrics wait in %s", where, brief(error), run)
        if error is None and self._silent:
            logger.info("MLflow at %s answers again", redact(self.uri))
        self._silent = error is not None
