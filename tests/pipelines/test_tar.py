"""The tar reader, compared with tarfile and with webdataset's own grouping."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import io
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator

import pytest
from webdataset.tariterators import base_plus_ext

from pipelines.tar import Member, TarError, TarReader
from pipelines.tar_records import read_records, split_name

NAMES = ["a.jpg", "b/ü ö.png", "c" * 90 + ".jpg", "deep/" * 30 + "d.jpg", "x" * 300 + ".cls", "empty.txt"]
SPECIAL = [tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE]
FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


def make_tar(contents: dict[str, bytes], format: int = tarfile.GNU_FORMAT, *, special: bool = False) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format) as tar:
        for number, (name, data) in enumerate(contents.items()):
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(data), 1.5 if format == tarfile.PAX_FORMAT else 1
            tar.addfile(info, io.BytesIO(data))
            if special:
                extra = tarfile.TarInfo(f"special {number}")
                extra.type, extra.linkname = (
                    SPECIAL[number % len(SPECIAL)],
                    "l" * (150 if format != tarfile.USTAR_FORMAT else 50),
                )
                tar.addfile(extra)
    return buffer.getvalue()


def contents_of(names: list[str]) -> dict[str, bytes]:
    return {name: bytes([65 + i]) * (i * 347 % 1800) for i, name in enumerate(names)}


def streaming(data: bytes) -> TarReader:
    return TarReader(io.BytesIO(data), digest=hashlib.sha256())


def seeking(data: bytes) -> TarReader:
    return TarReader(io.BytesIO(data))


@pytest.fixture(params=[streaming, seeking])
def reader(request: pytest.FixtureRequest) -> Callable[[bytes], TarReader]:
    return request.param  # type: ignore[no-any-return]


@pytest.mark.parametrize("format", FORMATS)
def test_members_lie_where_tarfile_finds_them(format: str, reader: Callable[[bytes], TarReader]) -> None:
    names = [name for name in NAMES if format != "ustar" or len(name) < 150]
    data = make_tar(contents_of(names), FORMATS[format], special=True)
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        expected = [(m.name, m.isreg(), m.offset, m.offset_data, m.size) for m in tar]
    assert [(m.name, m.type == "file", m.start, m.offset, m.size) for m in reader(data)] == expected
    assert Counter(m.type for m in reader(data) if m.type != "file").total() == len(names)


@pytest.mark.parametrize("format", FORMATS)
def test_contents_and_digest_are_those_of_the_file(format: str) -> None:
    contents = contents_of([name for name in NAMES if len(name) < 100])
    data = make_tar(contents, FORMATS[format])
    digest = hashlib.sha256()
    reader = TarReader(io.BytesIO(data), digest=digest)
    assert {member.name: reader.read() for member in reader if member.size % 2 == 0} == {
        name: value for name, value in contents.items() if len(value) % 2 == 0
    }
    assert (reader.position, digest.digest()) == (len(data), hashlib.sha256(data).digest())


def broken(data: bytes, members: list[Member]) -> Iterator[tuple[str, bytes, int, str]]:
    """What happened, the tar after it, where it is noticed, and what is said."""
    second, third, last = members[1], members[2], members[-1]
    yield "a zeroed header", data[: third.start] + bytes(512) + data[third.start + 512 :], third.start, "zeroed here"
    flipped = bytearray(data)
    flipped[third.start + 3] ^= 1
    yield "a flipped byte in a header", bytes(flipped), third.start, "bad checksum"
    yield "cut inside a member", data[: third.offset + 100], third.start, r"cut off: 100 of \d+ bytes"
    yield "cut at a member's border", data[: third.start], third.start, "without the end marker"
    yield "cut inside a header", data[: second.start + 100], second.start, "inside a header"
    yield "the end marker missing", data[: last.end], last.end, "without the end marker"
    yield "two tars joined", data + data, last.end, "joined tars"
    yield "nothing", b"", 0, "without the end marker"
    yield "gzip", gzip.compress(data, 0), 0, "compressed with gzip"
    yield "HTML", b"<html>" * 200, 0, "no tar header"
    huge = tarfile.TarInfo("huge.jpg")
    for size, words in ((2**50, rf"cut off: {len(data)} of {2**50} bytes"), (2**62, "a size of")):
        huge.size = size
        yield "a gigantic size", huge.tobuf(tarfile.GNU_FORMAT) + data, 0, words
    long = tarfile.TarInfo("long")
    long.type, long.size = tarfile.GNUTYPE_LONGNAME, 2**40
    yield "a gigantic name", long.tobuf(tarfile.GNU_FORMAT) + data, 0, "bytes for a name"


def test_damage_is_named_with_its_place(reader: Callable[[bytes], TarReader]) -> None:
    data = make_tar({f"{i}.jpg": bytes([65 + i]) * 700 for i in range(4)})
    members = list(seeking(data))
    for what, damaged, offset, words in broken(data, members):
        with pytest.raises(TarError, match=words) as caught:
            list(reader(damaged))
        assert caught.value.offset == offset, what


def test_no_cut_and_no_flipped_header_byte_goes_unnoticed(reader: Callable[[bytes], TarReader]) -> None:
    data = make_tar({"a.jpg": b"A" * 700, "b.jpg": b"B" * 10})
    members = list(reader(data))
    for cut in range(0, members[-1].end + 512, 37):
        with pytest.raises(TarError):
            list(reader(data[:cut]))
    for position in range(512):
        for bit in (1, 64, 128):
            flipped = bytearray(data)
            flipped[members[1].start + position] ^= bit
            found = members  # which is right, too: blanks around the checksum do not matter
            with contextlib.suppress(TarError):
                found = list(reader(bytes(flipped)))
            assert found == members


@pytest.mark.parametrize(
    ("names", "key", "offset", "before"),
    [
        (["a.jpg", "a.cls", "b.jpg", "a.json"], "'a'", 3072, 0),
        (["a.jpg", "b.jpg", "b.JPG"], "'b.JPG'", 2048, 1024),
        (["x/a.jpg", "x/b.jpg", "x/a.jpg"], "'x/a'", 2048, 0),
    ],
)
def test_a_repeated_key_names_both_places(names: list[str], key: str, offset: int, before: int) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name in names:
            info = tarfile.TarInfo(name)
            info.size = 3
            tar.addfile(info, io.BytesIO(b"abc"))
    with pytest.raises(TarError, match=f"{key} comes again here, after it began at byte {before}") as caught:
        list(read_records(seeking(buffer.getvalue()), lambda suffix: True, Counter()))
    assert caught.value.offset == offset


def test_keys_are_those_of_webdataset() -> None:
    names = ["a.jpg", "a.b.c", "x.y/a.jpg", "/abs/a.tar.gz", "../../a.png", "noext", ".a", "a.", "A.JPG"]
    for name in names:
        key, suffix = base_plus_ext(name)
        assert split_name(name) == (key, (suffix or "").lower()), name
    for name in ("__meta__/a.jpg", "d/._a.jpg", "d/.hidden"):  # what macOS adds: webdataset makes a record "d/" of all of them
        assert split_name(name) == (None, "")
