"""What a training example is: its kind, its image members and what is known about them."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from pipelines.hashing import Int64s, hash_entity

MAX_NEGATIVES = 8
MEMBERS: dict[str, tuple[str, ...]] = {
    "pair": ("anchor", "positive"),
    "labelled_pair": ("left", "right"),
    "triplet": ("anchor", "positive"),  # followed by the negatives
    "labelled": ("",),  # `<key>.jpg`
}
KINDS = tuple(MEMBERS)


class ImageFile(Protocol):
    """The bytes of one image, or of a `.npy` vector in its place, wherever they lie."""

    @property
    def name(self) -> str:
        """What a person would call it, e.g. its path relative to the source."""

    def read(self) -> bytes:
        """The whole file. Raises OSError."""


@dataclass(frozen=True, slots=True)
class LocalFile:
    """An image in a file of its own."""

    path: Path
    name: str

    def read(self) -> bytes:
        return self.path.read_bytes()


@dataclass(frozen=True, slots=True)
class Record:
    """One example.

    `images` are in the order of `member_names`. `entity` is the class of labelled data, else the `group` given by the user.
    `negative_entities` is as long as there are explicit negatives, or empty. `target` is a vector to compare the record with.
    """

    images: tuple[ImageFile, ...]
    entity: str | None = None
    negative_entities: tuple[str, ...] = ()
    match: int | None = None
    weight: float = 1.0
    target: ImageFile | None = None

    @property
    def name(self) -> str:
        return self.images[0].name

    @property
    def files(self) -> tuple[ImageFile, ...]:
        """The images, and the target behind them."""
        return self.images if self.target is None else (*self.images, self.target)


class Records(Protocol):
    """Records by number: a list of them, or columns that make them when asked."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Record: ...

    def __iter__(self) -> Iterator[Record]: ...


@dataclass(frozen=True, slots=True)
class Listing:
    """What a source holds: its records, and what was passed over on the way."""

    records: Records
    ignored: int = 0  # files that are hidden or no images
    empty_classes: tuple[str, ...] = ()
    nbytes: int = 0  # of the records' files, where known
    rejected: tuple[tuple[str, str], ...] = ()  # what lacks something, and what it is
    sizes: Int64s | None = None  # [n, k] bytes of every record's `files`: 0 where there is none, -1 where it is not known
    stamp: str = ""  # differs once the source has changed; empty: the records' own names have to do
    stage: Callable[[Path], Records] | None = None  # copies into a folder what is slow to read out of order


def require_kind(kind: str) -> None:
    """Raise ValueError unless `kind` is one of KINDS."""
    if kind not in MEMBERS:
        raise ValueError(f"unknown kind {kind!r}; the kinds are {', '.join(KINDS)}")


def member_names(kind: str, num_images: int) -> list[str]:
    """Names of the image members inside the tar, without the format: `anchor`, `positive`, `negative0`, ..."""
    names = list(MEMBERS[kind])
    negatives = num_images - len(names)
    if negatives == 1:
        return [*names, "negative"]
    return names + [f"negative{i}" for i in range(negatives)]


def member_groups(kind: str, record: Record, key: str) -> list[int]:
    """The `group` of each of the record's `files`: the entity's, else one that nothing else has.

    The right side of a labelled pair that does not match is something else than its left side, and so is every negative.
    """
    own = hash_entity(record.entity if record.entity is not None else f"\0{key}")
    groups = [own] * len(record.images)
    if kind == "labelled_pair" and not record.match:
        groups[1] = hash_entity(f"\0{key}/right")
    for i in range(len(MEMBERS[kind]), len(groups)):
        negative = i - len(MEMBERS[kind])
        known = record.negative_entities[negative] if record.negative_entities else f"\0{key}/negative{negative}"
        groups[i] = hash_entity(known)
    return groups if record.target is None else [*groups, own]


def make_key(index: int, name: str) -> str:
    """A key `[A-Za-z0-9_-]{1,64}` that is unique by its number and still tells where the record came from."""
    ascii_name = unicodedata.normalize("NFKD", Path(name).stem).encode("ascii", "ignore").decode()
    slug = re.sub(r"[^A-Za-z0-9_]+", "-", ascii_name).strip("-")[:40].rstrip("-")
    return f"{index:010d}-{slug}" if slug else f"{index:010d}"


def describe(kind: str, record: Record) -> bytes | None:
    """The `.json` member: what the images themselves do not tell; None when there is nothing to say."""
    about: dict[str, object] = {}
    if kind != "labelled":
        about["source"] = [image.name for image in record.images]
        if record.entity is not None:
            about["group"] = record.entity
    if kind == "labelled_pair":
        about["match"] = record.match
    if record.negative_entities:
        about["negative_groups"] = list(record.negative_entities)
    if record.weight != 1.0:
        about["weight"] = record.weight
    return json.dumps(about, ensure_ascii=True, sort_keys=True).encode() if about else None
