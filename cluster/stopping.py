"""Ctrl-C and SIGTERM: the first asks the ranks to save and stop, the second ends the run at once."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType, TracebackType

from cluster.progress import say
from cluster.runfolder import write_atomically

NAMES = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}


class Stopping:
    """As a context it takes both signals, where it is the main thread that enters it.

    While `asked_through` a file the first signal only writes that file, which rank 0 looks for; otherwise, and from the second
    on, a signal raises KeyboardInterrupt.
    """

    def __init__(self) -> None:
        self._file: Path | None = None
        self._before: dict[int, object] = {}
        self.number: int | None = None  # the first signal that came

    @property
    def reason(self) -> str:
        """What to tell of the end."""
        return f"stopped by {NAMES.get(signal.Signals(self.number), 'a signal')}" if self.number else "stopped"

    @property
    def exit_code(self) -> int:
        return 128 + (self.number or signal.SIGTERM)

    def listen(self) -> None:
        """Take the signals, again where something else has taken them meanwhile, as the start of Ray does."""
        if threading.current_thread() is threading.main_thread():
            for number in NAMES:
                before = signal.signal(number, self._heard)
                self._before.setdefault(number, before)

    @contextmanager
    def asked_through(self, file: Path) -> Iterator[None]:
        """While the ranks train."""
        self._file = file
        try:
            yield
        finally:
            self._file = None
            file.unlink(missing_ok=True)

    def __enter__(self) -> Stopping:
        self.listen()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)  # type: ignore[arg-type]
        self._before.clear()

    def _heard(self, number: int, _frame: FrameType | None) -> None:
        first, self.number = self.number is None, self.number or number
        if not first or self._file is None:
            raise KeyboardInterrupt
        try:
            write_atomically(self._file, self.reason)
        except OSError:  # a full disk cannot be asked through
            raise KeyboardInterrupt from None
        say(f"{NAMES[signal.Signals(number)]}: saving a checkpoint and stopping; once more stops at once")
