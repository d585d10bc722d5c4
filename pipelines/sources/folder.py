"""Images in a folder, one folder per class; folders inside a class belong to it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from pipelines.records import Listing, LocalFile, Record

IMAGE_SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".dib", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm"}
)


def list_folder(root: Path) -> Listing:
    """Every image below `root`, in sorted order; the class is the name of the first folder on the way to it.

    Raises ValueError when `root` is missing, has no image, or has images but no class folders.
    """
    if not root.is_dir():
        raise ValueError(f"no folder {str(root)!r}: give a folder that holds one folder of images per class")
    records: list[Record] = []
    ignored = nbytes = 0
    empty: list[str] = []
    for entry in sorted(os.scandir(root), key=lambda entry: entry.name):
        if entry.name.startswith(".") or not entry.is_dir():
            ignored += 1
            continue
        before, entity = len(records), readable(entry.name)
        for file in _files(Path(entry.path)):
            if file.name.startswith(".") or Path(file.name).suffix.lower() not in IMAGE_SUFFIXES:
                ignored += 1
                continue
            path = Path(file.path)
            records.append(Record((LocalFile(path, readable(path.relative_to(root).as_posix())),), entity=entity))
            nbytes += file.stat().st_size
        if len(records) == before:
            empty.append(entity)
    if not records:
        raise ValueError(f"no image in {str(root)!r}: {_explain_nothing(root, empty)}")
    return Listing(records, ignored, tuple(empty), nbytes)


def readable(name: str) -> str:
    """A file name as text that any file format takes: bytes that are no UTF-8 become `\\xNN`."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


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
        return f"its {len(empty)} folders ({', '.join(empty[:3])}, ...) hold no image files; known are {_known_suffixes()}"
    return "expected one folder per class with images in it"


def _known_suffixes() -> str:
    return " ".join(sorted(IMAGE_SUFFIXES))
