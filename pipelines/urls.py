"""Files of remote stores, by the URLs that fsspec opens: `s3://`, `gs://`, `https://`, `memory://`, ..."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import urlsplit

import fsspec.asyn
import fsspec.core

TRIES = 3
PAUSE_S = 0.5  # before the second try, twice that before the third
TIMEOUT_S = 60.0  # for one image
IN_A_ROW = 20  # images that are not given before their store counts as down
A_FEW = 3

T = TypeVar("T")


class StoreError(OSError):
    """A store answered several times with something else than a file."""


class StoreDown(RuntimeError):
    """A store gives nothing at all: going on would reject every image."""


@dataclass(frozen=True, slots=True)
class UrlFile:
    """An image in a remote store."""

    url: str
    name: str

    def read(self) -> bytes:
        """The whole file. Raises FileNotFoundError, StoreError after TRIES tries, StoreDown when many fail in a row."""
        try:
            data = retried(lambda fresh: _fetch(self.url, fresh))
        except FileNotFoundError:  # an answer too
            _failed.end()
            raise
        except ImportError as error:
            raise StoreDown(f"cannot read {self.url}: {error}") from error
        except Exception as error:
            reason = f"{type(error).__name__}: {error}".rstrip(": ")
            if _failed.add() >= IN_A_ROW:
                raise StoreDown(
                    f"{store_of(self.url)} does not answer: {IN_A_ROW} images in a row failed, the last with {reason}"
                ) from error
            raise StoreError(f"{TRIES} tries failed, the last with {reason}") from error
        _failed.end()
        return data


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file found in a store."""

    path: str  # what comes after the folder's URL
    nbytes: int  # -1 where the store does not tell
    changed: str  # differs once the file has


def store_of(url: str) -> str:
    """Scheme and host or bucket: what answers or does not."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc}"


def retried(call: Callable[[bool], T]) -> T:
    """`call(fresh)` up to TRIES times; `fresh` asks for a new connection. A file that is missing is not asked for again."""
    for attempt in range(TRIES):
        try:
            return call(attempt > 0)
        except (FileNotFoundError, ImportError, ValueError):
            raise
        except Exception:
            if attempt == TRIES - 1:
                raise
            time.sleep(PAUSE_S * 2**attempt)
    raise AssertionError("unreachable")


class Answers:
    """Whether stores have answered while many images were read."""

    def __init__(self) -> None:
        self._given: dict[str, UrlFile] = {}  # of each store one image
        self._num_given = self._num_failed = 0

    def note(self, image: object, error: Exception | None) -> None:
        """An image that was read, or the error that came instead."""
        if isinstance(image, UrlFile) and error is None:
            self._given.setdefault(store_of(image.url), image)
            self._num_given += 1
        self._num_failed += isinstance(error, StoreError)

    def require(self) -> None:
        """Raise StoreDown when most failed, more than A_FEW, or when what was given before is not given any more."""
        if self._num_failed > max(self._num_given, A_FEW):
            raise StoreDown(f"stores do not answer: {self._num_failed} images failed, only {self._num_given} could be fetched")
        if self._num_failed and self._given and not any(_is_up(image) for image in list(self._given.values())[:A_FEW]):
            raise StoreDown(f"{' and '.join(list(self._given)[:A_FEW])} do not answer any more")


def _is_up(image: UrlFile) -> bool:
    try:
        image.read()
    except FileNotFoundError:
        return True
    except StoreError:
        return False
    return True


def find(folder: str) -> tuple[str, list[RemoteFile]]:
    """The folder's URL in full and all files below it, in the order in which a walk through sorted folders meets them.

    Raises ValueError when there is none, RuntimeError when the store does not answer.
    """

    def list_all(fs: Any, path: str) -> tuple[str, dict[str, Any]]:
        entries = {fs.unstrip_protocol(name): about for name, about in fs.find(path, detail=True).items()}
        return fs.unstrip_protocol(path).rstrip("/") + "/", entries

    root, entries = _asked(folder, list_all)
    files = [
        RemoteFile(url.removeprefix(root), -1 if about.get("size") is None else int(about["size"]), _changed(about))
        for url, about in entries.items()
        if url.startswith(root)
    ]
    if not files:
        raise ValueError(f"no file below {folder!r}: give a folder that holds one folder of images per class")
    return root, sorted(files, key=lambda file: file.path.split("/"))


def stamp(url: str) -> str:
    """Size and time of a file as far as the store tells; differs once the file has changed."""
    return _changed(_asked(url, lambda fs, path: fs.info(path)))


@contextmanager
def opened(url: str) -> Iterator[Any]:
    """A seekable binary file. Raises as `find` does, also for what goes wrong while it is read."""
    with _asked(url, lambda fs, path: fs.open(path, "rb")) as file:
        try:
            yield file
        except (ValueError, KeyError, RuntimeError):  # of the reader's, or told already
            raise
        except Exception as error:
            raise RuntimeError(_silent(url, error)) from error


def _asked(url: str, question: Callable[[Any, str], T]) -> T:
    def ask(fresh: bool) -> T:
        return question(*fsspec.core.url_to_fs(url, skip_instance_cache=fresh))

    try:
        return retried(ask)
    except FileNotFoundError as error:
        raise ValueError(f"nothing at {url!r}") from error
    except (ImportError, ValueError) as error:
        raise ValueError(f"cannot open {url!r}: {error}") from error
    except Exception as error:
        raise RuntimeError(_silent(url, error)) from error


def _silent(url: str, error: Exception) -> str:
    return f"{store_of(url)} does not answer: {type(error).__name__}: {error}; asked for {url!r}"


def _fetch(url: str, fresh: bool) -> bytes:
    fs, path = fsspec.core.url_to_fs(url, skip_instance_cache=fresh)
    if fs.async_impl:
        return bytes(fsspec.asyn.sync(fs.loop, fs._cat_file, path, timeout=TIMEOUT_S))
    return bytes(fs.cat_file(path))


def _changed(info: dict[str, Any]) -> str:
    told = ("size", "ETag", "etag", "md5Hash", "LastModified", "last_modified", "mtime", "created")
    return " ".join(f"{name}={info[name]}" for name in told if info.get(name) is not None)


class _Streak:
    """How many images in a row were not given, over all threads. One that is given by whatever store ends it: where a table
    names many stores, some are gone for ever, and their images are simply left out."""

    def __init__(self) -> None:
        self._count = 0
        self._lock = threading.Lock()

    def add(self) -> int:
        with self._lock:
            self._count += 1
            return self._count

    def end(self) -> None:
        with self._lock:
            self._count = 0


_failed = _Streak()
