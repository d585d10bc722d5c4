"""Reads one tar front to back and describes its records as the manifest wants them."""

from __future__ import annotations

import hashlib
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import pyarrow as pa

from pipelines.decode import MAX_PIXELS, read_header
from pipelines.hashing import Int64s, hash_bytes
from pipelines.keys import hash_keys
from pipelines.records import member_groups
from pipelines.samples import SCHEMA, TARGET
from pipelines.sources.tars import as_record
from pipelines.tar import TarError, TarReader
from pipelines.tar_records import TarRecord, interpret, is_image, is_text, may_be_vector, read_records
from pipelines.tar_urls import open_tar
from pipelines.vectors import decode_vector


@dataclass(frozen=True, slots=True)
class Rejected:
    """What was left out, and why."""

    shard: str  # name of the tar
    key: str  # of a record; empty: the tar itself
    offset: int  # of the first header, or of the damage
    reason: str


@dataclass(frozen=True, slots=True)
class Scan:
    """All there is to know about one tar."""

    tar: str
    nbytes: int
    sha256: str
    samples: pa.Table  # SCHEMA
    key_hashes: Int64s  # [n]
    rejected: list[Rejected]
    passed: Counter[str]  # members that were not looked into, by what they are
    damage: Rejected | None  # why it was not read to its end


def scan_tar(tar: str, *, kind: str, keys_per_tar: bool = False) -> Scan:
    """Raises RuntimeError when the tar cannot be opened."""
    digest, passed = hashlib.sha256(), Counter[str]()
    rows: list[dict[str, Any]] = []
    rejected: list[Rejected] = []
    damage = None
    path = PurePosixPath(tar)
    with open_tar(tar) as file:
        reader = TarReader(file, digest=digest)
        try:
            for found in read_records(reader, _wanted, passed):
                key = f"{path.stem}/{found.key}" if keys_per_tar else found.key
                try:
                    rows.append(_row(tar, key, found, kind, passed))
                except ValueError as error:
                    rejected.append(Rejected(path.name, key, found.start, str(error)))
        except TarError as error:
            damage = Rejected(path.name, "", error.offset, error.reason)
            reader.drain()
    hashes = hash_keys([row["key"] for row in rows])
    samples = pa.Table.from_pylist(rows, SCHEMA)
    return Scan(tar, reader.position, digest.hexdigest(), samples, hashes, rejected, passed, damage)


def _wanted(suffix: str) -> bool:
    return is_text(suffix) or is_image(suffix) or may_be_vector(suffix)


def _row(tar: str, key: str, found: TarRecord, kind: str, passed: Counter[str]) -> dict[str, Any]:
    """A row of SCHEMA. Raises ValueError when the record lacks something or an image is none."""
    meaning = interpret(kind, found)
    record = as_record(tar, found, meaning)
    members = [found.members[suffix] for suffix in meaning.files]
    passed.update(_unused(found, meaning.files))
    images = [_image(found, suffix) for suffix in meaning.files]
    return {
        "key": key,
        "source": record.name,
        "label": record.entity,
        "offset_record": found.start,
        "nbytes_record": found.end - found.start,
        "match": -1 if record.match is None else record.match,
        "weight": record.weight,
        "bad": False,
        "view": [*range(len(meaning.images)), *([] if meaning.target is None else [TARGET])],
        "offset": [member.offset for member in members],
        "size": [member.size for member in members],
        "group": member_groups(kind, record, key),
        **{name: [image[name] for image in images] for name in images[0]},
    }


def _image(found: TarRecord, suffix: str) -> dict[str, int]:
    """What the manifest says about an image's or a vector's bytes. Raises ValueError when its header cannot be read."""
    data = found.data.get(suffix)
    if data is None:
        raise ValueError(f"{suffix}: {found.members[suffix].size} bytes are too many for an image")
    try:
        if may_be_vector(suffix):
            facts = {"width": 0, "height": 0, "dim": len(decode_vector(data))}
        else:
            header = read_header(data, max_pixels=MAX_PIXELS)
            facts = {"width": header.width, "height": header.height, "dim": 0}
    except ValueError as error:
        raise ValueError(f"{suffix}: {error}") from None
    return {"crc32": zlib.crc32(data), "uid": hash_bytes(data), **facts}


def _unused(found: TarRecord, used: tuple[str, ...]) -> Iterator[str]:
    """`.txt`, `.pkl`, ...: members of a record that nobody asks for."""
    for suffix in found.members:
        if suffix not in used and not is_text(suffix):
            yield f".{suffix.rpartition('.')[2]}"
