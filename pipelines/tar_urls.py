"""Which tars somebody means, and opening one."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import BinaryIO, cast

import fsspec
from braceexpand import braceexpand

from pipelines.remote import is_url

SUFFIX = ".tar"


def expand_tars(tars: Iterable[str | Path]) -> list[str]:
    """Paths and URLs of tars from paths, folders that hold tars, globs, `{000..123}` ranges and fsspec URLs, in their order.

    Local ones become absolute. Raises ValueError when something matches nothing or comes twice.
    """
    found = [url for tar in tars for url in _expand(str(tar))]
    if not found:
        raise ValueError("no tars; give paths, a folder, a glob or a range like 'shards/{000..123}.tar'")
    if len(set(found)) < len(found):
        twice = next(url for i, url in enumerate(found) if url in found[:i])
        raise ValueError(f"{twice!r} comes twice; each tar can be in a data set once")
    return found


def is_tars(source: str | Path) -> bool:
    """Whether SOURCE of `pack` stands for tars: a name or pattern that ends in .tar, or a folder of tars.

    A folder of tars has no other folder in it than the `samples` of a manifest.
    """
    if not os.path.isdir(source):
        return str(source).endswith(SUFFIX)
    entries = list(os.scandir(source))
    folders = [entry for entry in entries if entry.is_dir() and entry.name != "samples" and not entry.name.startswith(".")]
    return not folders and any(entry.name.endswith(SUFFIX) for entry in entries)


def open_tar(tar: str | Path) -> BinaryIO:
    """Raises RuntimeError when it cannot be opened."""
    try:
        if is_url(str(tar)):
            return cast(BinaryIO, fsspec.open(str(tar), "rb").open())
        return Path(tar).open("rb")
    except Exception as error:  # each remote file system has errors of its own
        raise RuntimeError(f"cannot open {str(tar)!r}: {getattr(error, 'strerror', None) or error}") from error


def _expand(tar: str) -> list[str]:
    if os.path.isdir(tar):
        return _require(sorted(str(path.absolute()) for path in Path(tar).glob(f"*{SUFFIX}")), tar, "holds no .tar file")
    if os.path.isfile(tar):  # first of all: a name may have braces in it
        return [os.path.abspath(tar)]
    try:
        names = list(braceexpand(tar))
    except ValueError as error:
        raise ValueError(f"{tar!r} has a brace without its other half") from error
    return [url for name in names for url in _match(name)]


def _match(name: str) -> Sequence[str]:
    if is_url(name):
        if not glob.has_magic(name.partition("?")[0] if name.startswith("http") else name):
            return [name]
        filesystem, pattern = fsspec.core.url_to_fs(name)
        return _require(sorted(filesystem.unstrip_protocol(path) for path in filesystem.glob(pattern)), name, "matches nothing")
    if glob.has_magic(name) and not os.path.exists(name):
        return _require(sorted(os.path.abspath(path) for path in glob.glob(name, recursive=True)), name, "matches nothing")
    return _require([os.path.abspath(name)] if os.path.isfile(name) else [], name, "is no file")


def _require(found: list[str], tar: str, otherwise: str) -> list[str]:
    if not found:
        raise ValueError(f"{tar!r} {otherwise}")
    return found
