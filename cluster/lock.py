"""One process at a time, also after a kill: the system lets go of the lock of a process that is gone."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
from pathlib import Path

TAKEN = (errno.EAGAIN, errno.EACCES)


class Held(RuntimeError):
    """Another process has the lock; `holder` says which."""

    def __init__(self, holder: str) -> None:
        super().__init__(f"{holder} has not let go of it")
        self.holder = holder


class Lock:
    """A lock on the file `path`, which is made and stays. Nothing is locked where the file system has no locks."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: int | None = None

    def take(self) -> None:
        """Raises Held when another process has it; to take it twice is to take it once."""
        if self._file is not None:
            return
        file = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in TAKEN:
                holder = os.pread(file, 200, 0).decode(errors="replace").strip()
                os.close(file)
                raise Held(holder or "another process") from error
        os.ftruncate(file, 0)
        os.pwrite(file, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        self._file = file

    def release(self) -> None:
        """Let go of it, where it was taken."""
        if self._file is not None:
            os.close(self._file)
            self._file = None
