"""Records out of webdataset tars, whose images stay where they are until they are read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pipelines.records import Listing, Record
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
        try:
            with open_tar(self.tar) as file:
                file.seek(self.offset)
                data = file.read(self.size)
        except RuntimeError as error:
            raise OSError(str(error)) from error
        if len(data) != self.size:
            raise OSError(f"{self.tar} ends early: {len(data)} of {self.size} bytes")
        return data


def list_tars(source: str | Path, kind: str) -> Listing:
    """Every record of the tars that `source` stands for: a tar, a folder of them, a glob or a range, also as a URL.

    Records that lack something are listed as rejected. Raises ValueError when a tar is damaged or no record is of `kind`.
    """
    records: list[Record] = []
    rejected: list[tuple[str, str]] = []
    passed = Counter[str]()
    nbytes = 0
    misfits: list[TarRecord] = []  # the first few
    for tar in expand_tars([source]):
        for found in _records(tar, passed):
            try:
                meaning = interpret(kind, found)
            except ValueError as error:
                rejected.append((f"{Path(tar).name}/{found.key}", str(error)))
                misfits = [*misfits, found][:10]
                continue
            records.append(as_record(tar, found, meaning))
            nbytes += sum(found.members[suffix].size for suffix in meaning.images)
    if not records:
        raise ValueError(f"no record of kind {kind!r} in {str(source)!r}; {_explain(misfits)}")
    return Listing(records, ignored=passed.total(), nbytes=nbytes, rejected=tuple(rejected))


def as_record(tar: str, found: TarRecord, meaning: Meaning) -> Record:
    """In the terms of the other sources."""
    members = [found.members[suffix] for suffix in meaning.images]
    images = tuple(TarImage(tar, member.name, member.offset, member.size) for member in members)
    return Record(images, meaning.entity, meaning.negative_entities, meaning.match, meaning.weight)


def _records(tar: str, passed: Counter[str]) -> Iterator[TarRecord]:
    with open_tar(tar) as file:
        try:
            yield from read_records(TarReader(file), is_text, passed)
        except TarError as error:
            raise ValueError(f"{tar!r}, {error}") from None


def _explain(misfits: list[TarRecord]) -> str:
    try:
        return f"they look like {infer_kind(misfits)!r}: give --kind"
    except ValueError as error:
        return str(error)
