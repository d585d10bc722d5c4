"""Images in a folder, one folder per class; folders inside a class belong to it."""

from __future__ import annotations

import os
from array import array
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pyarrow as pa

from pipelines.columns import ColumnRecords
from pipelines.records import ImageFile, Listing, LocalFile
from pipelines.urls import UrlFile, find

IMAGE_SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".dib", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm"}
)


def list_folder(root: Path) -> Listing:
    """Every image below `root`, in sorted order; the class is the name of the first folder on the way to it.

    Raises ValueError when `root` is missing, has no image, or has images but no class folders.
    """
    if not root.is_dir():
        raise ValueError(f"no folder {str(root)!r}: give a folder that holds one folder of images per class")
    found = _Found()
    empty: list[str] = []
    for entry in sorted(os.scandir(root), key=lambda entry: entry.name):
        if entry.name.startswith(".") or not entry.is_dir():
            found.ignored += 1
            continue
        before = len(found.sizes)
        for file in _files(Path(entry.path)):
            if not _is_image(file.name):
                found.ignored += 1
                continue
            about = file.stat()
            path = os.path.relpath(file.path, root)
            found.add(os.fsencode(path), entry.name, about.st_size, about.st_mtime_ns)
        if len(found.sizes) == before:
            empty.append(readable(entry.name))
    if not found.sizes:
        raise ValueError(f"no image in {str(root)!r}: {_explain_nothing(root, empty)}")
    return found.listing(lambda path: LocalFile(root / path, readable(path)), tuple(empty))


def list_loose_folder(root: Path) -> Listing:
    """As `list_folder`, and also the images that lie directly in `root`, whose class is empty. Raises ValueError."""
    if not root.is_dir():
        raise ValueError(f"no folder {str(root)!r}: give a folder of images, a table or shards")
    found = _Found()
    for entry in sorted(os.scandir(root), key=lambda entry: entry.name):
        if entry.name.startswith("."):
            found.ignored += 1
            continue
        for file in _files(Path(entry.path)) if entry.is_dir() else [entry]:
            if not _is_image(file.name):
                found.ignored += 1
                continue
            about = file.stat()
            path = os.fsencode(os.path.relpath(file.path, root))
            found.add(path, entry.name if entry.is_dir() else "", about.st_size, about.st_mtime_ns)
    if not found.sizes:
        raise ValueError(f"no image in {str(root)!r}; known are {' '.join(sorted(IMAGE_SUFFIXES))}")
    return found.listing(lambda path: LocalFile(root / path, readable(path)))


def list_remote_folder(url: str) -> Listing:
    """As `list_folder`, for the URL of a folder. Raises RuntimeError when the store does not answer."""
    root, files = find(url)
    plain = unquote if root.startswith("http") else str  # only there a path says `%20`
    found = _Found()
    for file in files:
        *folders, name = plain(file.path).split("/")
        if not folders or any(part.startswith(".") for part in (*folders, name)) or not _is_image(name):
            found.ignored += 1
        else:
            found.add(file.path.encode(), folders[0], file.nbytes, file.changed)
    if not found.sizes:
        raise ValueError(f"no image in {url!r}: expected one folder per class with images in it")
    return found.listing(lambda path: UrlFile(root + path, plain(path)))


def readable(name: str) -> str:
    """A file name as text that any file format takes: bytes that are no UTF-8 become `\\xNN`."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


class _Found:
    """Columns that grow with every image found."""

    def __init__(self) -> None:
        self.ignored = 0
        self.sizes = array("q")
        self._codes = array("i")
        self._classes: dict[str, int] = {}
        self._paths: list[bytes] = []
        self._packed: list[pa.Array] = []
        self._stamp = sha256()

    def add(self, path: bytes, entity: str, nbytes: int, changed: object) -> None:
        """`path` relative to the source; `changed` differs once the file has."""
        self.sizes.append(nbytes)
        self._codes.append(self._classes.setdefault(readable(entity), len(self._classes)))
        self._paths.append(path)
        self._stamp.update(b"%s\0%d %s\n" % (path, nbytes, str(changed).encode()))
        if len(self._paths) >= 100_000:
            self._pack()

    def listing(self, image: Callable[[str], ImageFile], empty: tuple[str, ...] = ()) -> Listing:
        """`image` makes the file of a path relative to the source."""
        self._pack()
        paths = pa.chunked_array(self._packed)
        codes, sizes = np.asarray(self._codes, np.int32), np.asarray(self.sizes, np.int64)
        entities = pa.DictionaryArray.from_arrays(pa.array(codes), pa.array(list(self._classes), pa.large_string()))
        records = ColumnRecords(len(sizes), [lambda row: image(os.fsdecode(paths[row].as_py()))], entities=entities)
        nbytes = int(np.maximum(sizes, 0).sum())
        stamp = self._stamp.hexdigest()
        return Listing(records, self.ignored, empty, nbytes, sizes=sizes[:, None], stamp=stamp)

    def _pack(self) -> None:
        self._packed.append(pa.array(self._paths, pa.large_binary()))
        self._paths = []


def _is_image(name: str) -> bool:
    return not name.startswith(".") and Path(name).suffix.lower() in IMAGE_SUFFIXES


def _files(folder: Path) -> Iterator[os.DirEntry[str]]:
    """Files below `folder`, in sorted order; hidden folders are passed over, links to folders are not followed."""
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        if entry.is_dir(follow_symlinks=False):
            if not entry.name.startswith("."):
                yield from _files(Path(entry.path))
        elif entry.is_file():
            yield entry


def _explain_nothing(root: Path, empty: list[str]) -> str:
    if any(Path(name).suffix.lower() in IMAGE_SUFFIXES for name in os.listdir(root)):
        return "the images lie directly in it; put them into one folder per class"
    if empty:
        known = " ".join(sorted(IMAGE_SUFFIXES))
        return f"its {len(empty)} folders ({', '.join(empty[:3])}, ...) hold no image files; known are {known}"
    return "expected one folder per class with images in it"
