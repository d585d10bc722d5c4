"""The fingerprints of all images of a data set."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from pipelines.decode import decode
from pipelines.hashing import Int64s, Uint64s
from pipelines.manifest import Manifest
from pipelines.mixture import parts_of
from pipelines.parallel import Map, in_process
from pipelines.phash import THUMB, Thumbs, fingerprint
from pipelines.read import Reader
from pipelines.records import member_names
from pipelines.samples import ShardTable

T = TypeVar("T")
IMAGES_A_TASK = 256


@dataclass(frozen=True, slots=True)
class Images:
    """n images of a data set, by what its manifest knows of them. Equal bytes have equal uids."""

    uid: Int64s  # [n]
    group: Int64s  # [n]
    shard: Int64s  # [n]
    member: Int64s  # [n] in the shard's table


@dataclass(frozen=True, slots=True)
class Prints:
    """n images that could be decoded, as they look."""

    images: Images
    pixels: Int64s  # [n]
    hash: Uint64s  # [n]
    mirrored: Uint64s  # [n]
    thumb: Thumbs  # [n, 8, 8, 3]
    flat: NDArray[np.bool_]  # [n]


class Task(NamedTuple):
    """Some images of shard `shard` of a data set, which is number `number` of all its sources together."""

    location: str
    cache: str | None
    shard: int
    number: int
    members: Int64s


def images_of(manifest: Manifest) -> Images:
    """All of them, in their order, but for records that are known to be bad. Reads no image."""
    return _join([_listed(manifest.table(shard), shard) for shard in range(len(manifest.sizes))], Images)


def prints_of(
    manifest: Manifest, *, cache: str | None = None, map: Map = in_process, progress: Callable[[int, int], None] | None = None
) -> tuple[Prints, int]:
    """All images as they look, and how many cannot be decoded, which are left out. `progress` hears (images, of all)."""
    parts, seen, done = [], 0, 0
    for part, asked in map(_print, _tasks(manifest, cache)):
        parts.append(part)
        seen, done = seen + asked, done + len(part.pixels)
        if progress is not None:
            progress(seen, manifest.num_images)
    return _join(parts, Prints), seen - done


def places_of(manifest: Manifest, images: Images, rows: Int64s) -> list[tuple[int, str]]:
    """For some of the images: the number of the record, and which of its images it is (see `member_names`)."""
    places = []
    for shard, member in zip(images.shard[rows].tolist(), images.member[rows].tolist(), strict=True):
        table = manifest.table(shard)
        row = int(np.searchsorted(table.start, member, side="right")) - 1
        many = int(table.start[row + 1] - table.start[row]) - int(manifest.target_dim > 0)
        name = member_names(manifest.kind, many)[member - int(table.start[row])]
        places.append((int(manifest.starts[shard]) + row, name))
    return places


def names_of(manifest: Manifest, images: Images, rows: Int64s) -> list[str]:
    """What to call some of the images: the key, and for pairs and triplets the member."""
    keys = {shard: manifest.keys(shard) for shard in np.unique(images.shard[rows]).tolist()}
    names = []
    for shard, (record, member) in zip(images.shard[rows].tolist(), places_of(manifest, images, rows), strict=True):
        key = keys[shard][record - int(manifest.starts[shard])]
        names.append(f"{key}.{member}" if member else key)
    return names


def file_of(manifest: Manifest, images: Images, row: int) -> bytes | None:
    """The bytes of one image, or None when they cannot be read any more."""
    shard, member = int(images.shard[row]), int(images.member[row])
    table, reader = manifest.table(shard), Reader(manifest)
    try:
        return reader.read(shard, int(table.offset[member]), int(table.size[member]), int(table.crc32[member]))
    except (ValueError, RuntimeError):
        return None
    finally:
        reader.close()


def _listed(table: ShardTable, shard: int, members: Int64s | None = None) -> Images:
    """`members` of a shard's table; without, all that are images."""
    if members is None:
        record = np.repeat(np.arange(len(table.bad)), np.diff(table.start))
        members = np.flatnonzero((table.dim == 0) & ~table.bad[record])
    return Images(table.uid[members], table.group[members], np.full(len(members), shard, np.int64), members)


def _tasks(manifest: Manifest, cache: str | None) -> Iterator[Task]:
    number = 0
    for part in parts_of(manifest):
        for shard in range(len(part.sizes)):
            members = _listed(part.table(shard), shard).member
            for start in range(0, max(1, len(members)), IMAGES_A_TASK):
                yield Task(part.location, cache, shard, number, members[start : start + IMAGES_A_TASK])
            number += 1


def _print(task: Task) -> tuple[Prints, int]:
    """The fingerprints of a task's images, and how many it was asked for."""
    manifest = _opened(task.location, task.cache)
    table, reader = manifest.table(task.shard), Reader(manifest)
    kept, prints = [], []
    try:
        for index in task.members.tolist():
            where = int(table.offset[index]), int(table.size[index]), int(table.crc32[index])
            try:
                pixels = decode(reader.read(task.shard, *where))
            except ValueError:
                continue
            kept.append(index)
            prints.append(fingerprint(pixels))
    finally:
        reader.close()
    found = Prints(
        images=_listed(table, task.number, np.asarray(kept, np.int64)),
        pixels=np.asarray([one.pixels for one in prints], np.int64),
        hash=np.asarray([one.hash for one in prints], np.uint64),
        mirrored=np.asarray([one.mirrored for one in prints], np.uint64),
        thumb=np.asarray([one.thumb for one in prints], np.uint8).reshape(-1, THUMB, THUMB, 3),
        flat=np.asarray([one.flat for one in prints], np.bool_),
    )
    return found, len(task.members)


@lru_cache(maxsize=8)  # a task is small, a manifest may be large
def _opened(location: str, cache: str | None) -> Manifest:
    return Manifest.open(location, cache=cache)


def _join(parts: Sequence[T], kind: type[T]) -> T:
    """One after the other, field by field."""
    joined = {}
    for field in fields(kind):  # type: ignore[arg-type]
        values = [getattr(part, field.name) for part in parts]
        joined[field.name] = _join(values, Images) if field.name == "images" else np.concatenate(values)
    return kind(**joined)
