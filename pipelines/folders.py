"""A folder that appears complete or not at all."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def fresh_folder(out: Path, *, needed_bytes: int = 0) -> Iterator[Path]:
    """A temporary folder beside `out` that becomes `out` at the end; on failure or Ctrl-C nothing is left behind.

    Raises ValueError, touching nothing, when `out` holds something already; RuntimeError when the disk is full.
    """
    require_free(out)
    temporary = out.parent / f"{out.name}.tmp-{os.getpid()}"
    try:
        make_folder(temporary)
        try:
            yield temporary
            os.replace(temporary, out)
        except OSError as error:
            if not is_full(error):
                raise
            raise RuntimeError(f"{explain_full(out, needed_bytes)}; nothing was kept") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def require_free(out: Path) -> None:
    """Raise ValueError when `out` is a file, or a folder with something in it."""
    if out.is_dir():
        if any(out.iterdir()):
            raise ValueError(f"{str(out)!r} exists and is not empty: remove it or give another name")
    elif out.exists() or out.is_symlink():
        raise ValueError(f"{str(out)!r} exists and is not a folder: remove it or give another name")


def make_folder(folder: Path, *, exist_ok: bool = False) -> None:
    """With its parents. Raises RuntimeError when that cannot be."""
    try:
        folder.mkdir(parents=True, exist_ok=exist_ok)
    except OSError as error:
        raise RuntimeError(f"cannot make the folder {str(folder)!r}: {error.strerror}") from error


def sync(path: Path) -> None:
    """Write a file, or the entries of a folder, through to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def is_full(error: OSError) -> bool:
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


def explain_full(out: Path, needed_bytes: int) -> str:
    """What to tell when the disk of `out` is full; 0 needed bytes: not known."""
    free_mb = shutil.disk_usage(_existing_parent(out)).free / 2**20
    need = f"about {needed_bytes / 2**20:.0f} MB are needed, " if needed_bytes else ""
    return f"no space left on the disk of {str(out)!r}: {need}{free_mb:.0f} MB are free"


def _existing_parent(path: Path) -> Path:
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path
