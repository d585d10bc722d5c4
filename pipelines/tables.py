"""Where the files of a manifest are: in a folder, or behind a URL and fetched whole into the node's cache."""

from __future__ import annotations

import hashlib
import threading
from pathlib import Path
from typing import IO

from pipelines.cache import NodeCache
from pipelines.remote import PIECE, TIMEOUT_S, describe, fetch, is_url, join


class Tables:
    """Paths of a manifest's files by their names. Safe to use from several threads."""

    def __init__(self, location: str, cache: str | None) -> None:
        """`cache`: folder for what is fetched, used only when `location` is a URL."""
        self.location = location
        self._cache = NodeCache(cache) if is_url(location) else None
        self._found: dict[str, Path] = {}
        self._lock = threading.Lock()

    def path(self, name: str) -> Path:
        """The file `name`; a remote one is fetched when first asked for. Raises RuntimeError when that fails."""
        if self._cache is None:
            return Path(self.location) / name
        with self._lock:
            found = self._found.get(name)
            if found is None or not found.exists():  # nothing that is unused for a week stays
                found = self._found[name] = _fetched(self._cache, join(self.location, name))
            return found


def _fetched(cache: NodeCache, url: str) -> Path:
    nbytes, state = describe(url)
    name = "tables/" + hashlib.sha256(f"{url} {state}".encode()).hexdigest()

    def write(file: IO[bytes]) -> None:
        for start in range(0, nbytes, PIECE):
            piece = fetch(url, start, min(start + PIECE, nbytes))
            if len(piece) != min(PIECE, nbytes - start):
                raise RuntimeError(f"{url} became shorter while it was fetched; try again")
            file.write(piece)

    cache.open(name, write, timeout_s=TIMEOUT_S)
    return cache.folder / name
