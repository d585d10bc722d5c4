"""Ends a rank that does nothing any more, so that the others need not wait for it for ever."""

from __future__ import annotations

import faulthandler
import logging
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

EXIT_CODE = 70  # of a rank that was ended
POLL_S = 1.0
logger = logging.getLogger(__name__)


class Watchdog:
    """As a context: unless `beat` is called every `timeout_s`, the stacks of all threads go to a file and the process ends.

    A thread looks; no lock that a hanging thread may hold is needed for it.
    """

    def __init__(self, stacks: Path, timeout_s: float, leave_word: Callable[[str], None], *, first_s: float = 0.0) -> None:
        """first_s: how much longer the first beat may take, of a step that compiles."""
        self._stacks, self._timeout_s, self._leave_word = stacks, timeout_s, leave_word
        self._step, self._last = 0, time.monotonic() + first_s
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="nearfar-watchdog", daemon=True)

    def beat(self, step: int | None = None) -> None:
        """A sign of life; `step` is the last one done."""
        self._last = max(self._last, time.monotonic()) if step is None else time.monotonic()
        self._step = self._step if step is None else step

    def __enter__(self) -> Watchdog:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._over.set()

    def _watch(self) -> None:
        while not self._over.wait(min(POLL_S, self._timeout_s / 4)):
            if time.monotonic() - self._last > self._timeout_s:
                self._end()

    def _end(self) -> None:
        reason = f"hung: nothing done for {self._timeout_s:g} s after step {self._step} (cluster.timeout_s)"
        try:
            self._stacks.parent.mkdir(parents=True, exist_ok=True)
            with self._stacks.open("w") as file:
                file.write(f"{reason}\n\n")
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
            reason += f"; where its threads were is in {self._stacks}"
        except OSError:  # a full disk
            faulthandler.dump_traceback(all_threads=True)
        self._leave_word(reason)
        logger.error("%s", reason)
        os._exit(EXIT_CODE)
