"""A folder of fetched files that all processes of a node share, kept below a budget."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

POLL_S = 0.02
KEPT_FREE = 0.05  # of the disk, whatever the budget
SWEEPS = 64  # in the time in which one process fetches a whole budget
TABLE_DAYS, LEFTOVER_S = 7, 3600


class OpenFile:
    """A file to read from by offset, by any number of threads. Closed when nobody uses it any more; may be unlinked."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    @classmethod
    def open(cls, path: Path) -> OpenFile:
        """Raises OSError."""
        return cls(os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0)))

    def read(self, size: int, offset: int) -> bytes:
        """At most `size` bytes, fewer at the end of the file. Raises OSError."""
        return os.pread(self._fd, size, offset)

    def __del__(self) -> None:
        os.close(self._fd)


class NodeCache:
    """`blocks/` is kept below the budget, the least recently opened go first; `tables/` are left until unused for a week.

    A file appears by rename, under a name that says what is in it, so it is never half-written by us and never out of date.
    """

    def __init__(self, folder: str | None, budget_bytes: int | None = None) -> None:
        """Without a folder, the user's own below the temporary directory; without a budget, one that removes nothing.

        Raises RuntimeError when the folder cannot be made.
        """
        self.folder = _own_folder() if folder is None else Path(folder).expanduser()
        self.budget_bytes = budget_bytes
        self._unswept = budget_bytes or 0  # bytes written since the last sweep: the first file brings one
        self._lock = threading.Lock()
        _make(self.folder)

    def open(self, name: str, write: Callable[[IO[bytes]], None], *, timeout_s: float) -> tuple[OpenFile, bool]:
        """The file, and whether this call had to `write` it; others that want it at the same time wait for this one.

        Raises RuntimeError when it cannot be written, or is being written by another process for `timeout_s`.
        """
        path = self.folder / name
        found = _opened(path)
        if found is not None:
            return found, False
        path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(path.with_name(f"{path.name}.lock"), timeout_s):
            found = _opened(path)
            if found is not None:
                return found, False
            made = self._write(path, write)
        if self.budget_bytes is not None:
            self._sweep_now_and_then(path, self.budget_bytes)
        return made, True

    def drop(self, name: str) -> None:
        """Forget a file that turned out to be damaged."""
        (self.folder / name).unlink(missing_ok=True)

    def _write(self, path: Path, write: Callable[[IO[bytes]], None]) -> OpenFile:
        temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.tmp")
        try:
            with temporary.open("w+b") as file:
                write(file)
                file.flush()
                made = OpenFile(os.dup(file.fileno()))
            temporary.replace(path)
            return made
        except OSError as error:
            raise RuntimeError(
                f"cannot write to the cache folder {self.folder}: {error.strerror or error}; "
                "free some space, lower data.cache_gb, or set data.cache to a folder on another disk"
            ) from error
        finally:
            temporary.unlink(missing_ok=True)

    def _sweep_now_and_then(self, newest: Path, budget: int) -> None:
        with self._lock:  # a thread that has written meanwhile sweeps after this one
            self._unswept += newest.stat().st_size if newest.exists() else 0
            if self._unswept < budget // SWEEPS:
                return
            with contextlib.suppress(BlockingIOError), _locked(self.folder / "sweep.lock", 0.0, keep=True):
                self._sweep(budget)
                self._unswept = 0  # not where another process is at it: the next file tries again

    def _sweep(self, budget: int) -> None:
        files = [entry for entry in self._entries("blocks") if not _leftover(entry)]
        used = sum(entry.stat().st_size for entry in files)
        disk = shutil.disk_usage(self.folder)
        # Below the budget by what may be fetched until the next sweep.
        room = min(budget * 7 // 8, used + disk.free - int(KEPT_FREE * disk.total))
        for entry in sorted(files, key=lambda entry: entry.stat().st_mtime):
            if used <= room:
                break
            used -= entry.stat().st_size
            Path(entry).unlink(missing_ok=True)
        oldest = time.time() - TABLE_DAYS * 86_400
        for entry in self._entries("tables"):
            if not _leftover(entry) and entry.stat().st_mtime < oldest:
                Path(entry).unlink(missing_ok=True)

    def _entries(self, kind: str) -> Iterator[os.DirEntry[str]]:
        for folder, _, _ in os.walk(self.folder / kind):
            with os.scandir(folder) as entries:
                for entry in entries:
                    with contextlib.suppress(FileNotFoundError):  # another process removed it just now
                        if entry.is_file() and entry.stat():
                            yield entry


def _opened(path: Path) -> OpenFile | None:
    """The file when it is there, marked as just used."""
    try:
        found = OpenFile.open(path)
    except FileNotFoundError:
        return None
    with contextlib.suppress(FileNotFoundError):  # removed just now: what is open can still be read
        os.utime(path)
    return found


@contextlib.contextmanager
def _locked(path: Path, timeout_s: float, *, keep: bool = False) -> Iterator[None]:
    """Hold a file's lock, which the system takes back from a process that dies. Raises BlockingIOError, or RuntimeError.

    The file is removed afterwards; that two may then hold `the` lock costs one fetch too many, never a wrong byte.
    """
    deadline = time.monotonic() + timeout_s
    fd = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o600)
    try:
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if keep:
                    raise
                if time.monotonic() > deadline:
                    raise RuntimeError(
                        f"another process has been fetching {path.stem} for {timeout_s:g} s (data.timeout_s); end it"
                    ) from None
                time.sleep(POLL_S)
        yield
        if not keep:
            path.unlink(missing_ok=True)
    finally:
        fcntl.flock(fd, fcntl.LOCK_UN)  # closing would not do when a forked child has inherited it
        os.close(fd)


def _leftover(entry: os.DirEntry[str]) -> bool:
    """Whether it is a lock or an unfinished file; removes those of processes that were killed."""
    if not entry.name.endswith((".tmp", ".lock")):
        return False
    if time.time() - entry.stat().st_mtime > LEFTOVER_S:
        Path(entry).unlink(missing_ok=True)
    return True


def _own_folder() -> Path:
    return Path(tempfile.gettempdir()) / f"nearfar-cache-{os.getuid()}"


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise RuntimeError(f"cannot make the cache folder {folder}: {error.strerror}; set data.cache to another") from error
    # Below the temporary directory anybody may have made a folder of this name, and could change what we read.
    if folder == _own_folder() and (folder.is_symlink() or folder.stat().st_uid != os.getuid()):
        raise RuntimeError(f"the cache folder {folder} belongs to somebody else; set data.cache to another")
