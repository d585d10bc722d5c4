"""What can be wrong with a shard, and what it costs: the table behind test_faults.py."""

from __future__ import annotations

import io
import os
import struct
import tarfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from pipelines.samples import ShardTable

Damage = Callable[[Path, ShardTable], None]


@dataclass(frozen=True)
class Case:
    """What is done to the second shard of three, the images of it that get lost (0..15), and what is said of them."""

    damage: Damage = lambda path, table: None
    lost: range = range(0)
    reason: str = ""
    packed: dict[int, bytes] = field(default_factory=dict)  # images that were packed like this


def cut(at: Callable[[ShardTable], int]) -> Damage:
    return lambda path, table: os.truncate(path, at(table))


def change(at: Callable[[ShardTable], int], xor: bytes) -> Damage:
    def damage(path: Path, table: ShardTable) -> None:
        data, start = bytearray(path.read_bytes()), at(table)
        data[start : start + len(xor)] = bytes(a ^ b for a, b in zip(data[start : start + len(xor)], xor, strict=True))
        path.write_bytes(data)

    return damage


def zero_header(path: Path, table: ShardTable) -> None:
    data, start = bytearray(path.read_bytes()), int(table.offset[6]) - 512
    data[start : start + 512] = bytes(512)
    path.write_bytes(data)


def drop_member(path: Path, table: ShardTable) -> None:
    """Without image 9 (the positive of record 4) everything after it lies elsewhere."""
    data, start, end = path.read_bytes(), int(table.offset[9]) - 512, int(table.offset[9] + -(-table.size[9] // 512) * 512)
    path.write_bytes(data[:start] + data[end:])


def repeat_key(path: Path, table: ShardTable) -> None:
    """Record 3 gets the name of record 2, with the right checksum: a group by key would mix the two."""
    with tarfile.open(path) as tar:
        members = list(tar)
        contents = [tar.extractfile(member).read() for member in members]  # type: ignore[union-attr]
    keys = list(dict.fromkeys(member.name.partition(".")[0] for member in members))
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for member, content in zip(members, contents, strict=True):
            member.name = member.name.replace(keys[3], keys[2])
            tar.addfile(member, io.BytesIO(content))
    with tarfile.open(path) as tar:
        assert len(set(tar.getnames())) < len(members)


def replace(path: Path, table: ShardTable) -> None:
    path.write_bytes(path.with_name("000002.tar").read_bytes())


def _bomb() -> bytes:
    """A PNG that says it has 60,000 x 60,000 pixels."""
    header = b"IHDR" + struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    body = b"\x00\x00\x00\x0d" + header + struct.pack(">I", zlib.crc32(header))
    return b"\x89PNG\r\n\x1a\n" + body + b"\x00\x00\x00\x00IEND\xaeB`\x82"


HTML = b"<!DOCTYPE html><html><body>404 Not Found</body></html>"
CASES = {
    "truncated inside a member": Case(cut(lambda t: int(t.offset[11]) + 10), range(11, 16), "ends early: (10|0) of"),
    "truncated at a member boundary": Case(cut(lambda t: int(t.offset[10]) - 512), range(10, 16), "ends early: 0 of"),
    "zeroed header": Case(zero_header),
    "flipped payload byte": Case(change(lambda t: int(t.offset[5]) + 200, b"\x01"), range(5, 6), "CRC32"),
    "flipped header byte": Case(change(lambda t: int(t.offset[5]) - 512, b"\x10")),
    "missing member": Case(drop_member, range(9, 16), "CRC32|ends early"),
    "repeated key": Case(repeat_key),
    "replaced by another": Case(replace, range(16), "CRC32|ends early"),
    "HTML instead of JPEG": Case(lost=range(7, 8), reason="not an image", packed={7: HTML}),
    "decompression bomb": Case(lost=range(2, 3), reason="pixels|bomb", packed={2: _bomb()}),
    "0-byte file": Case(cut(lambda t: 0), range(16), "ends early: 0 of"),
}
