"""The one kind of error that changes what a driver does, and the one cause of it that anything written can meet."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class Unrecoverable(RuntimeError):
    """A run must stop for a reason that starting it again from its checkpoint would only meet again."""


class DiskFull(Unrecoverable, OSError):
    """Nothing more can be written to a disk; the message names the file."""


def is_full(error: OSError) -> bool:
    """Whether it says that there is no space left, or no quota."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


@contextmanager
def naming_full_disk(path: Path) -> Iterator[None]:
    """Turns the system's word of a full disk, which names no file, into DiskFull that does."""
    try:
        yield
    except OSError as error:
        if not is_full(error):
            raise
        raise DiskFull(f"cannot write {path}: {error.strerror}; free some space there, then go on with --resume") from error
