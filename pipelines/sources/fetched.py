"""What `nearfar fetch` leaves behind: a folder of images by class, with the licences they come under."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from pipelines.folders import fresh_folder

Progress = Callable[[int, int | None], None]
LICENCES = "LICENCES.md"


@dataclass(frozen=True, slots=True)
class Licence:
    """Where a part of a data set comes from and under what terms."""

    part: str
    source: str
    terms: str


@dataclass(frozen=True, slots=True)
class FetchSummary:
    """A data set that was fetched."""

    classes: int
    images: int
    licences: tuple[Licence, ...]


@dataclass(frozen=True, slots=True)
class ClassImage:
    """An image file to be, below its class."""

    entity: str
    name: str
    data: bytes


def write_images(
    out: Path,
    images: Iterable[ClassImage],
    licences: tuple[Licence, ...],
    *,
    title: str,
    total: int,
    progress: Progress | None,
    beside: Mapping[str, str] | None = None,
) -> FetchSummary:
    """Write OUT/<class>/<image>, OUT/LICENCES.md and files `beside` them (name -> text), all or nothing.

    Raises ValueError when `out` holds something already, RuntimeError when the disk is full.
    """
    classes: set[str] = set()
    count = 0
    with fresh_folder(out) as folder:
        for image in images:
            if image.entity not in classes:
                (folder / image.entity).mkdir()
                classes.add(image.entity)
            (folder / image.entity / image.name).write_bytes(image.data)
            count += 1
            if progress is not None:
                progress(count, total)
        for name, text in (beside or {}).items():
            (folder / name).write_text(text, "utf-8")
        (folder / LICENCES).write_text(_describe(title, licences), "utf-8")
    return FetchSummary(len(classes), count, licences)


def _describe(title: str, licences: tuple[Licence, ...]) -> str:
    rows = "\n".join(f"| {licence.part} | {licence.source} | {licence.terms} |" for licence in licences)
    return f"# {title}: sources and licences\n\n| images | source | licence |\n| --- | --- | --- |\n{rows}\n"
