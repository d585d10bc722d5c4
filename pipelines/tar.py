"""Reads a tar front to back and says where everything lies in it; nothing is ever extracted."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO, Protocol

BLOCK = 512  # headers take one, contents are filled up to a multiple
MAX_EXTENSION = 2**20  # bytes of one long name or pax header
_CHUNK = 2**20
_LONG_NAMES = {tarfile.GNUTYPE_LONGNAME: "path", tarfile.GNUTYPE_LONGLINK: "linkpath"}
_PAX = (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE)
_EXTENSIONS = (*_LONG_NAMES, *_PAX, tarfile.XGLTYPE)
_TYPES = {
    tarfile.LNKTYPE: "hard link",
    tarfile.SYMTYPE: "symbolic link",
    tarfile.CHRTYPE: "device",
    tarfile.BLKTYPE: "device",
    tarfile.DIRTYPE: "directory",
    tarfile.FIFOTYPE: "fifo",
    tarfile.GNUTYPE_SPARSE: "sparse file",
    **dict.fromkeys((tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE), "file"),
}
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\0": "xz", b"\x28\xb5\x2f\xfd": "zstd"}


class Digest(Protocol):
    """As hashlib makes them."""

    def update(self, data: bytes, /) -> None: ...


class TarError(ValueError):
    """A tar that cannot be read on; `offset` is where, in bytes from its start."""

    def __init__(self, offset: int, reason: str) -> None:
        super().__init__(offset, reason)
        self.offset, self.reason = offset, reason

    def __str__(self) -> str:
        return f"at byte {self.offset}: {self.reason}"


@dataclass(frozen=True, slots=True)
class Member:
    """One entry of a tar. Its name is text for people and for grouping, and never becomes a path."""

    name: str
    type: str  # "file", or what it is instead
    start: int  # of its first header
    offset: int  # of its contents
    size: int  # of its contents

    @property
    def end(self) -> int:
        """Where the next header begins."""
        return self.offset + padded(self.size)


class TarReader:
    """Iterate to get the members; `read` gives the contents of the one that was yielded last.

    A damaged or zeroed header, and contents or an end marker that are missing, raise TarError where they are met
    (`tarfile` takes a zeroed header for the end).
    """

    def __init__(self, file: BinaryIO, *, start: int = 0, digest: Digest | None = None) -> None:
        """`start` is where in the tar `file` begins. With a `digest` every byte goes through it; else contents are skipped."""
        self._file, self._digest = file, digest
        self.position = start
        self._member: Member | None = None
        self._size: int | None = None
        if digest is None:
            self._size = start + file.seek(0, 2)
            file.seek(0)

    def __iter__(self) -> Iterator[Member]:
        while (member := self._next()) is not None:
            self._member = member
            yield member
            self._skip(member)

    def read(self) -> bytes:
        """The contents of the current member, once. Raises TarError when the file ends before they do."""
        member = self._member
        assert member is not None
        assert self.position == member.offset
        self._require_there(member)
        data = self._take(padded(member.size))
        if len(data) < padded(member.size):
            raise _cut_off(member, len(data))
        return data[: member.size]

    def drain(self) -> None:
        """Read what is left, for the digest; `position` is the size of the file then."""
        while self._take(_CHUNK):
            pass

    def _next(self) -> Member | None:
        """The next member, or None at the end marker."""
        start, extra = self.position, dict[str, str]()
        while True:
            at, block = self.position, self._take(BLOCK)
            if not block:
                raise TarError(at, "the file ends without the end marker of a tar: it was cut off here")
            if len(block) < BLOCK:
                raise TarError(at, "the file ends inside a header: it was cut off")
            if not any(block):
                self._require_nothing_more(at)
                return None
            info = _parse(block, at)
            if info.type not in _EXTENSIONS:
                self._skip_sparse_map(info, block)
                return _member(info, start, self.position, extra)
            extra.update(self._extension(info, at))

    def _extension(self, info: tarfile.TarInfo, at: int) -> dict[str, str]:
        """What a long-name or pax header says about the member behind it; a global one is passed over."""
        if not 0 <= info.size <= MAX_EXTENSION:
            raise TarError(at, f"damaged header: {info.size} bytes for a name")
        data = self._take(padded(info.size))
        if len(data) < padded(info.size):
            raise TarError(at, "the file ends inside a header: it was cut off")
        if info.type in _LONG_NAMES:
            return {_LONG_NAMES[info.type]: data[: info.size].split(b"\0", 1)[0].decode("utf-8", "backslashreplace")}
        return _parse_pax(data[: info.size], at) if info.type in _PAX else {}

    def _skip_sparse_map(self, info: tarfile.TarInfo, block: bytes) -> None:
        more = info.type == tarfile.GNUTYPE_SPARSE and block[482]
        while more:
            more = (self._take(BLOCK) or bytes(BLOCK))[-8]

    def _skip(self, member: Member) -> None:
        """Go to the end of `member`, whose contents may have been read."""
        self._require_there(member)
        if self._size is not None:
            self._file.seek(member.end - self.position, 1)
            self.position = member.end
        while self.position < member.end:
            if not self._take(min(member.end - self.position, _CHUNK)):
                raise _cut_off(member, self.position - member.offset)

    def _require_there(self, member: Member) -> None:
        if self._size is not None and member.end > self._size:
            raise _cut_off(member, self._size - member.offset)

    def _require_nothing_more(self, at: int) -> None:
        """Behind the end marker come zeros, if anything. Anything else: a header was wiped out, or there is a second tar."""
        while True:
            before, chunk = self.position, self._take(_CHUNK)
            if not chunk:
                return
            if any(chunk):
                seen = before + len(chunk) - len(chunk.lstrip(b"\0"))
                raise TarError(at, f"a header is zeroed here, with more data from byte {seen} on: damaged, or joined tars")

    def _take(self, size: int) -> bytes:
        """`size` bytes; fewer only at the end of the file."""
        parts, left = list[bytes](), size
        while left > 0 and (data := self._file.read(left)):
            parts.append(data)
            left -= len(data)
            if self._digest is not None:
                self._digest.update(data)
        self.position += size - left
        return parts[0] if len(parts) == 1 else b"".join(parts)


def padded(size: int) -> int:
    """Bytes that contents of `size` take in a tar."""
    return -(-size // BLOCK) * BLOCK


def printable(text: str) -> str:
    """`text` with everything escaped that would do something to a terminal."""
    return text if text.isprintable() else "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in text)


def _parse(block: bytes, at: int) -> tarfile.TarInfo:
    try:
        return tarfile.TarInfo.frombuf(block, "utf-8", "backslashreplace")
    except (tarfile.HeaderError, ValueError) as error:
        kind = next((name for magic, name in _COMPRESSED.items() if at == 0 and block.startswith(magic)), None)
        if kind is not None:
            raise TarError(at, f"compressed with {kind}; images are read by their place, so decompress it first") from None
        raise TarError(at, f"no tar header, or a damaged one ({error})") from None


def _member(info: tarfile.TarInfo, start: int, offset: int, extra: dict[str, str]) -> Member:
    size = extra.get("size", str(info.size))
    if not size.isdecimal() or len(size) > 18:
        raise TarError(start, f"damaged header: a size of {size[:30]}")
    kind = _TYPES.get(info.type, "unknown type")
    if any(name.startswith("GNU.sparse") for name in extra):
        kind = "sparse file"
    # As `tarfile` has it: links, directories and devices have no contents, whatever their header claims.
    has_contents = info.isreg() or info.type not in tarfile.SUPPORTED_TYPES
    return Member(printable(extra.get("path", info.name)), kind, start, offset, int(size) if has_contents else 0)


def _parse_pax(data: bytes, at: int) -> dict[str, str]:
    """Records of `LENGTH KEY=VALUE\\n`, LENGTH counting all of the record."""
    found, position = dict[str, str](), 0
    while position < len(data) and data[position]:
        space = data.find(b" ", position, position + 12)
        length = data[position:space] if space > 0 else b""
        end = position + int(length) if length.isdigit() else 0
        key, equals, value = data[space + 1 : end - 1].partition(b"=")
        if not position < end <= len(data) or not equals:
            raise TarError(at, "damaged header: its pax records cannot be read")
        found[key.decode("utf-8", "backslashreplace")] = value.decode("utf-8", "backslashreplace")
        position = end
    return found


def _cut_off(member: Member, seen: int) -> TarError:
    reason = f"{member.name} is cut off: {max(0, min(seen, member.size))} of {member.size} bytes are there"
    return TarError(member.start, reason)
