"""Records out of webdataset tars, whose images stay where they are until they are read."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path

import numpy as np

from pipelines.manifest import Manifest
from pipelines.records import Listing, Record
from pipelines.remote import describe, fetch, is_url
from pipelines.tar import TarError, TarReader
from pipelines.tar_records import Meaning, TarRecord, infer_kind, interpret, is_text, read_records
from pipelines.tar_urls import expand_tars, open_tar


@dataclass(frozen=True, slots=True)
class TarImage:
    """A member of a tar."""

    tar: str
    member: str
    offset: int
    size: int

    @property
    def name(self) -> str:
        return f"{Path(self.tar).name}/{self.member}"

    def read(self) -> bytes:
        """Raises as `read_range` does."""
        return read_range(self.tar, self.offset, self.size)


def read_range(tar: str, offset: int, size: int) -> bytes:
    """Some bytes of a tar. Raises OSError when they are not all there; as `fetch` does when a store does not give them."""
    if is_url(tar):
        data = fetch(tar, offset, offset + size)
    else:
        with open(tar, "rb") as file:
            file.seek(offset)
            data = file.read(size)
    if len(data) != size:
        raise OSError(f"{tar} ends early: {len(data)} of {size} bytes")
    return data


def list_tars(source: str | Path, kind: str) -> Listing:
    """Every record of the tars that `source` stands for: a tar, a folder of them, a glob or a range, also as a URL.

    Records that lack something are listed as rejected. Raises ValueError when a tar is damaged or no record is of `kind`.
    """
    records: list[Record] = []
    rejected: list[tuple[str, str]] = []
    passed = Counter[str]()
    sizes: list[list[int]] = []
    misfits: list[TarRecord] = []  # the first few
    tars = expand_tars([source])
    names = _class_names(str(source)) if kind == "labelled" else {}
    for tar in tars:
        for found in _records(tar, passed):
            try:
                meaning = interpret(kind, found)
            except ValueError as error:
                rejected.append((f"{Path(tar).name}/{found.key}", str(error)))
                misfits = [*misfits, found][:10]
                continue
            meaning = replace(meaning, entity=names.get((Path(tar).name, found.key), meaning.entity))
            records.append(as_record(tar, found, meaning))
            sizes.append([found.members[suffix].size for suffix in meaning.files])
    if not records:
        raise ValueError(f"no record of kind {kind!r} in {str(source)!r}; {_explain(misfits)}")
    widest = max(map(len, sizes))
    known = np.asarray([[*row, *[0] * (widest - len(row))] for row in sizes], dtype=np.int64)
    stamp = sha256(" ".join(map(_stamp, tars)).encode()).hexdigest()
    return Listing(records, ignored=passed.total(), nbytes=int(known.sum()), rejected=tuple(rejected), sizes=known, stamp=stamp)


def as_record(tar: str, found: TarRecord, meaning: Meaning) -> Record:
    """In the terms of the other sources."""
    members = [found.members[suffix] for suffix in meaning.files]
    files = [TarImage(tar, member.name, member.offset, member.size) for member in members]
    images, target = (files, None) if meaning.target is None else (files[:-1], files[-1])
    return Record(tuple(images), meaning.entity, meaning.negative_entities, meaning.match, meaning.weight, target)


def _class_names(source: str) -> dict[tuple[str, str], str]:
    """(tar, key) -> name of the class, where a manifest beside the tars has it; they themselves have but a number."""
    if not os.path.isfile(os.path.join(source, "manifest.json")):
        return {}
    manifest = Manifest.open(source)
    names: dict[tuple[str, str], str] = {}
    for shard in range(len(manifest.sizes)):
        tar = manifest.shard_file(shard).name
        names |= {(tar, key): name for key, name in zip(manifest.keys(shard), manifest.column(shard, "label"), strict=True)}
    return names


def _records(tar: str, passed: Counter[str]) -> Iterator[TarRecord]:
    with open_tar(tar) as file:
        try:
            yield from read_records(TarReader(file), is_text, passed)
        except TarError as error:
            raise ValueError(f"{tar!r}, {error}") from None


def _stamp(tar: str) -> str:
    """Differs once the tar has changed."""
    if is_url(tar):
        return f"{tar} {describe(tar)}"
    about = os.stat(tar)
    return f"{tar} {about.st_size} {about.st_mtime_ns}"


def _explain(misfits: list[TarRecord]) -> str:
    try:
        return f"they look like {infer_kind(misfits)!r}: give --kind"
    except ValueError as error:
        return str(error)
