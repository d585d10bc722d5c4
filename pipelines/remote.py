"""Files behind URLs, by fsspec: ranges of their bytes, with retries on a new connection."""

from __future__ import annotations

import logging
import random
import re
import time
from collections.abc import Callable
from typing import Any, TypeVar

import fsspec

from configs.errors import Unrecoverable
from configs.schema import Data

T = TypeVar("T")
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
logger = logging.getLogger(__name__)

ATTEMPTS = 5
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.25, 8.0  # the pause between two tries doubles
SHARE_OF_A_TRY = 1 / 3  # of the time left
PIECE = 8 * 2**20
TIMEOUT_S: float = Data.model_fields["timeout_s"].default
_NOT_THERE = (FileNotFoundError, PermissionError, IsADirectoryError)  # without the right to list, S3 says 403 for a missing key


def is_url(location: str) -> bool:
    """Whether fsspec has to open it: `s3://...`, `https://...`, `memory://...`."""
    return _URL.match(location) is not None


def join(root: str, name: str) -> str:
    """`name` below the URL `root`, unless it is a URL itself."""
    return name if is_url(name) else f"{root.rstrip('/')}/{name}"


def fetch(url: str, start: int, stop: int, *, timeout_s: float = TIMEOUT_S) -> bytes:
    """Bytes [start, stop) of a file; fewer when the file ends before `stop`.

    Raises Unrecoverable when there is no such file, RuntimeError when it could not be had in ATTEMPTS tries or `timeout_s`,
    ValueError for a URL that fsspec cannot open.
    """
    end = stop

    def once(fs: Any, path: str, timeout: dict[str, float]) -> bytes:
        nonlocal end
        if start >= end:
            return b""
        try:
            data: bytes = fs.cat_file(path, start=start, end=end, **timeout)
            if len(data) > end - start:
                raise OSError(f"it sent {len(data)} bytes where {end - start} were asked for: no range requests?")
            if len(data) < end - start:
                raise OSError(f"it sent {len(data)} of {end - start} bytes")
            return data
        except Exception:
            end = max(start, min(end, _size(fs, path, timeout, end)))  # a file that is too short is no reason to try again
            raise

    return _retried(url, f"bytes {start} to {stop} of {url}", once, timeout_s)


def fetch_whole(url: str, *, timeout_s: float = TIMEOUT_S) -> bytes:
    """A small file. Raises as `fetch` does."""

    def once(fs: Any, path: str, timeout: dict[str, float]) -> bytes:
        data: bytes = fs.cat_file(path, **timeout)
        return data

    return _retried(url, url, once, timeout_s)


def describe(url: str, *, timeout_s: float = TIMEOUT_S) -> tuple[int, str]:
    """(bytes, text that changes when the file does). Raises as `fetch` does."""

    def once(fs: Any, path: str, timeout: dict[str, float]) -> tuple[int, str]:
        try:
            info = fs.info(path, **timeout)
        except FileNotFoundError as error:  # what the HTTP file system makes of every failure
            if getattr(error.__cause__, "status", 404) not in (403, 404, 410):
                raise OSError(str(error.__cause__)) from error
            raise
        if info.get("size") is None:
            raise OSError("its size is not told")
        return int(info["size"]), repr(sorted((name, str(value)) for name, value in info.items()))

    return _retried(url, url, once, timeout_s)


def _retried(url: str, what: str, once: Callable[[Any, str, dict[str, float]], T], timeout_s: float) -> T:
    deadline = time.monotonic() + timeout_s
    problem: Exception = TimeoutError("no time left")
    for attempt in range(ATTEMPTS):
        fs, path = _open(url)
        left = deadline - time.monotonic()
        if left <= 0:
            break
        try:
            return once(fs, path, {"timeout": left * SHARE_OF_A_TRY} if fs.async_impl else {})
        except Exception as error:  # every file system has its own kinds
            problem = error
            fs.clear_instance_cache()  # the next try gets a new connection
            logger.warning("try %d of %d: %s: %s", attempt + 1, ATTEMPTS, what, _plain(error))
        if attempt + 1 < ATTEMPTS:
            pause = min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2**attempt) * random.uniform(0.5, 1.0)
            time.sleep(max(0.0, min(pause, deadline - time.monotonic())))
    message = f"cannot fetch {what}: {_plain(problem)}; "
    if isinstance(problem, _NOT_THERE):
        raise Unrecoverable(f"{message}it is missing or may not be read: restore it or pack the data again") from problem
    raise RuntimeError(f"{message}{ATTEMPTS} tries within {timeout_s:g} s (data.timeout_s) failed") from problem


def _open(url: str) -> tuple[Any, str]:
    try:
        fs, path = fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise ValueError(f"{url} cannot be opened: {error}") from error
    return fs, path


def _size(fs: Any, path: str, timeout: dict[str, float], otherwise: int) -> int:
    """Bytes of the file, `otherwise` when nobody tells."""
    try:
        size = fs.info(path, **timeout).get("size")
    except Exception:
        return otherwise
    return otherwise if size is None else int(size)


def _plain(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}".rstrip(": ")
