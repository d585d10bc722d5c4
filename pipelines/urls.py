"""Files of remote stores, by the URLs that fsspec opens: `s3://`, `gs://`, `https://`, `memory://`, ..."""

from __future__ import annotations

import re
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import urlsplit

import fsspec.asyn
import fsspec.core

TRIES = 3
PAUSE_S = 0.5  # before the second try, twice that before the third
TIMEOUT_S = 60.0  # for one image
IN_A_ROW = 20  # images that a store fails to give before it counts as down

T = TypeVar("T")
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")


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
        store = store_of(self.url)
        try:
            data = retried(lambda fresh: _fetch(self.url, fresh))
        except FileNotFoundError:  # an answer too
            _failed.forget(store)
            raise
        except ImportError as error:
            raise StoreDown(f"cannot read {self.url}: {error}") from error
        except Exception as error:
            reason = f"{type(error).__name__}: {error}".rstrip(": ")
            if _failed.count(store) >= IN_A_ROW:
                raise StoreDown(
                    f"{store} does not answer: {IN_A_ROW} images in a row failed, the last with {reason}"
                ) from error
            raise StoreError(f"{TRIES} tries failed, the last with {reason}") from error
        _failed.forget(store)
        return data


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file found in a store."""

    path: str  # what comes after the folder's URL
    nbytes: int  # -1 where the store does not tell
    changed: str  # differs once the file has


def is_url(text: str) -> bool:
    return _URL.match(text) is not None


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
    """Whether the stores that failed to give some images give anything at all."""

    def __init__(self) -> None:
        self._given: dict[str, UrlFile] = {}
        self._failed: Counter[str] = Counter()

    def note(self, image: object, error: Exception | None) -> None:
        """An image that was read, or the error that came instead."""
        if isinstance(image, UrlFile):
            if error is None:
                self._given.setdefault(store_of(image.url), image)
            elif isinstance(error, StoreError):
                self._failed[store_of(image.url)] += 1

    def require(self) -> None:
        """Raise StoreDown unless each store that failed still gives an image that it gave before.

        A store that gave none is believed to be up when it failed once or twice only.
        """
        for store, count in self._failed.items():
            if store not in self._given and count > 2:
                raise StoreDown(f"{store} does not answer: it gave none of {count} images")
            if store in self._given:
                try:
                    self._given[store].read()
                except FileNotFoundError:
                    pass
                except StoreError as error:
                    raise StoreDown(f"{store} does not answer any more: {error}") from error


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


def open_file(url: str) -> Any:
    """A seekable binary file. Raises as `find` does."""
    return _asked(url, lambda fs, path: fs.open(path, "rb"))


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
        raise RuntimeError(f"{store_of(url)} does not answer: {type(error).__name__}: {error}; asked for {url!r}") from error


def _fetch(url: str, fresh: bool) -> bytes:
    fs, path = fsspec.core.url_to_fs(url, skip_instance_cache=fresh)
    if fs.async_impl:
        return bytes(fsspec.asyn.sync(fs.loop, fs._cat_file, path, timeout=TIMEOUT_S))
    return bytes(fs.cat_file(path))


def _changed(info: dict[str, Any]) -> str:
    told = ("size", "ETag", "etag", "md5Hash", "LastModified", "last_modified", "mtime", "created")
    return " ".join(f"{name}={info[name]}" for name in told if info.get(name) is not None)


class _Failed:
    """How many images in a row each store has failed to give, over all threads."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._lock = threading.Lock()

    def count(self, store: str) -> int:
        with self._lock:
            self._counts[store] += 1
            return self._counts[store]

    def forget(self, store: str) -> None:
        with self._lock:
            self._counts.pop(store, None)


_failed = _Failed()
