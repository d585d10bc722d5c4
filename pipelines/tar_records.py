"""Members of a webdataset tar as records, and what such a record says in the terms of `records.Record`."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from pipelines.records import MAX_NEGATIVES, MEMBERS
from pipelines.sources.folder import IMAGE_SUFFIXES
from pipelines.sources.table import MATCH
from pipelines.tar import Member, TarError, TarReader

MAX_MEMBER = 2**29  # bytes; what is larger is not read
_MAX_TEXT = 2**20  # bytes of a `.cls` or a `.json`
_MAX_WEIGHT = 1e38  # a float32
_TEXTS = ("cls", "json")
_KEY = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]*)")  # webdataset's rule: up to the first dot of the last component
_META = re.compile(r"__[^/]*__($|/)")  # left out by webdataset, too
_MOST_FIRST = ("triplet", "labelled_pair", "pair", "labelled")  # a triplet could be a pair, too
_NEGATIVE = re.compile(r"negative\d?")
_TARGET = "target.npy"
_MAY_BE_VECTOR = re.compile(r"(anchor|positive|left|right|negative\d?|target)\.npy")  # `<key>.npy` is somebody's own


@dataclass(slots=True)
class TarRecord:
    """Members that share a key and lie side by side."""

    key: str
    start: int  # of the first header, in bytes from the start of the tar
    end: int = 0
    members: dict[str, Member] = field(default_factory=dict)  # by what follows the key, e.g. `anchor.jpg`
    data: dict[str, bytes] = field(default_factory=dict)  # contents of those that were asked for


@dataclass(frozen=True, slots=True)
class Meaning:
    """A record's image members in the order of `member_names`, and what it says about them; fields as in `Record`."""

    images: tuple[str, ...]  # or `.npy` in their place
    entity: str | None
    negative_entities: tuple[str, ...]
    match: int | None
    weight: float
    target: str | None = None  # a member, too

    @property
    def files(self) -> tuple[str, ...]:
        """The images, and the target behind them."""
        return self.images if self.target is None else (*self.images, self.target)


def read_records(tar: TarReader, wanted: Callable[[str], bool], passed: Counter[str]) -> Iterator[TarRecord]:
    """The records of a tar, in its order, with the contents of the `wanted` members; others are never looked into.

    `passed` counts the members that belong to no record, by what they are. Raises TarError also when a key comes again
    after another one, or twice in a record.
    """
    record: TarRecord | None = None
    seen: dict[str, int] = {}
    for member in tar:
        key, suffix = split_name(member.name)
        if member.type != "file" or key is None:
            passed[member.type if member.type != "file" else "outside of records"] += 1
            continue
        if record is None or record.key != key:
            if record is not None:
                yield record
            if key in seen:
                raise TarError(member.start, f"the key {key!r} comes again here, after it began at byte {seen[key]}")
            record = TarRecord(key, member.start)
            seen[key] = member.start
        if suffix in record.members:
            first = record.members[suffix].start
            raise TarError(member.start, f"{member.name!r} comes again here, after it began at byte {first}")
        record.members[suffix], record.end = member, member.end
        if wanted(suffix) and member.size <= (_MAX_TEXT if suffix in _TEXTS else MAX_MEMBER):
            record.data[suffix] = tar.read()
    if record is not None:
        yield record


def split_name(name: str) -> tuple[str | None, str]:
    """Key and suffix (in lower case) of a member; no key when stock webdataset would pass it over.

    >>> split_name("a.b/c.anchor.JPG")
    ('a.b/c', 'anchor.jpg')
    """
    found = _KEY.fullmatch(name)
    return (None, "") if found is None or _META.match(name) else (found[1], found[2].lower())


def is_text(suffix: str) -> bool:
    return suffix in _TEXTS


def is_image(suffix: str) -> bool:
    """Of an image member of any kind, `jpg` or `anchor.jpg`."""
    return f".{suffix.rpartition('.')[2]}" in IMAGE_SUFFIXES


def may_be_vector(suffix: str) -> bool:
    """Of a `.npy` member that can stand for an image, or be a target."""
    return _MAY_BE_VECTOR.fullmatch(suffix) is not None


def interpret(kind: str, record: TarRecord) -> Meaning:
    """Raises ValueError with the reason when it is no record of `kind`. Needs the contents of its texts."""
    images = [_the_image(name, record) for name in MEMBERS[kind]]
    about = _about(record)
    match = None
    if kind == "triplet":
        found = (suffix for suffix in record.members if is_image(suffix) or may_be_vector(suffix))
        negatives = sorted({_stem(suffix) for suffix in found if _NEGATIVE.fullmatch(_stem(suffix))})
        if not 1 <= len(negatives) <= MAX_NEGATIVES:
            raise ValueError(f"{len(negatives)} negatives; a triplet has 1 to {MAX_NEGATIVES}")
        images += [_the_image(name, record) for name in negatives]
    if kind == "labelled_pair":
        match = MATCH.get(str(about.get("match")).strip().lower())
        if match is None:
            raise ValueError(f"its .json has match = {about.get('match')!r}, not 0 or 1")
    entity = _label(record, about) if kind == "labelled" else _text(about.get("group"), "group") or None
    if not any(is_image(suffix) for suffix in images):
        raise ValueError("no image in the record, only vectors")
    target = _TARGET if _TARGET in record.members else None
    return Meaning(tuple(images), entity, _negative_entities(kind, images, about), match, _weight(about), target)


def infer_kind(records: Iterable[TarRecord]) -> str:
    """The kind that most of the records can be. Raises ValueError, telling what they hold, when they can be none."""
    votes, seen = Counter[str](), ""
    for record in records:
        seen = seen or f"{record.key!r} has the members {', '.join(sorted(record.members))}"
        for kind in _MOST_FIRST:
            try:
                interpret(kind, record)
            except ValueError:
                continue
            votes[kind] += 1
            break
    if not votes:
        raise ValueError(
            f"cannot tell the kind of the records: {seen or 'there are none'}. Needed are <key>.jpg with <key>.cls, or with a "
            "label in <key>.json (labelled); <key>.anchor.jpg, <key>.positive.jpg (pair), and <key>.negative.jpg (triplet); or "
            "<key>.left.jpg, <key>.right.jpg and match in <key>.json (labelled_pair)"
        )
    return votes.most_common(1)[0][0]


def _stem(suffix: str) -> str:
    """`anchor` of `anchor.jpg`, nothing of `jpg`."""
    return suffix.rpartition(".")[0]


def _the_image(name: str, record: TarRecord) -> str:
    found = [suffix for suffix in record.members if _stem(suffix) == name and is_image(suffix)]
    found = found or [suffix for suffix in record.members if _stem(suffix) == name and may_be_vector(suffix)]
    if len(found) != 1:
        wanted = f"{name} image" if name else "image"
        raise ValueError(f"{' and '.join(found)}: one {wanted} is expected" if found else f"no {wanted}")
    return found[0]


def _about(record: TarRecord) -> dict[str, Any]:
    """What the `.json` says; nothing when there is none, or when it holds no object."""
    if "json" not in record.members:
        return {}
    if "json" not in record.data:
        raise ValueError(f"its .json has {record.members['json'].size} bytes, more than {_MAX_TEXT}")
    try:
        about = json.loads(record.data["json"])
    except (ValueError, RecursionError) as error:
        raise ValueError(f"its .json cannot be read: {error}") from None
    return about if isinstance(about, dict) else {}


def _label(record: TarRecord, about: dict[str, Any]) -> str:
    if "cls" in record.members:
        try:
            label = record.data.get("cls", b"").decode("utf-8").strip()
        except UnicodeDecodeError:
            raise ValueError("its .cls is no text") from None
        if not label:
            raise ValueError("its .cls is empty or too large")
        return label
    name = next((name for name in ("label", "class", "cls") if about.get(name) is not None), None)
    found = _text(about[name], name) if name is not None else None
    if not found:
        raise ValueError("no label: neither a .cls nor label, class or cls in a .json")
    return found


def _text(value: object, name: str) -> str | None:
    if value is None:
        return None
    if not isinstance(value, (str, int)) or isinstance(value, bool):
        raise ValueError(f"its .json has {name} = {str(value)[:40]!r}, which is neither text nor an integer")
    str(value).encode()  # JSON can hold halves of surrogate pairs, which nothing can write; a ValueError
    return str(value)


def _negative_entities(kind: str, images: list[str], about: dict[str, Any]) -> tuple[str, ...]:
    groups, count = about.get("negative_groups"), len(images) - len(MEMBERS[kind])
    if kind != "triplet" or groups is None:
        return ()
    if not isinstance(groups, list) or len(groups) != count or None in groups:
        raise ValueError(f"its .json has negative_groups = {str(groups)[:40]!r}; expected is a list of {count}")
    return tuple(str(_text(group, "negative_groups")) for group in groups)


def _weight(about: dict[str, Any]) -> float:
    weight = about.get("weight", 1.0)
    if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0.0 <= weight <= _MAX_WEIGHT:
        raise ValueError(f"its .json has weight = {str(weight)[:40]!r}; expected is a number from 0 on")
    return float(weight)
