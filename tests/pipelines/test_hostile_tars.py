"""A tar made by somebody who means harm: nothing of it is run, and nothing is written outside of where it should be."""

from __future__ import annotations

import io
import os
import pickle
import struct
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest

from pipelines.manifest import Manifest
from tests.conftest import Answer
from tests.pipelines.streams import settings, take
from tests.pipelines.tars import jpeg


class Payload:
    """Makes a file when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return (os.mkdir, (str(self.target),))


def bomb_png() -> bytes:
    """A sound header of 100000 x 100000 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(10**6))) + chunk(b"IEND", b"")


def hostile_tar(folder: Path, outside: Path) -> None:
    payload = pickle.dumps(Payload(outside / "run"))
    with tarfile.open(folder / "a.tar", "w", format=tarfile.PAX_FORMAT) as tar:

        def add(name: str, data: bytes = b"", type_: bytes = tarfile.REGTYPE, link: str = "") -> None:
            info = tarfile.TarInfo(name)
            info.size, info.type, info.linkname = len(data), type_, link
            tar.addfile(info, io.BytesIO(data))

        for number, key in enumerate(("good", "../../outside/up", f"{outside}/absolute", "a/../../outside/b", "\x1b[31mred\n")):
            add(f"{key}.jpg", jpeg(number))
            add(f"{key}.cls", str(number % 2).encode())
            for suffix in ("pkl", "pickle", "pth", "pyd", "pt", "npy"):
                add(f"{key}.{suffix}", payload)
        add("link.jpg", type_=tarfile.SYMTYPE, link=str(outside))
        add("link.jpg/through.jpg", jpeg(50))
        add("link.cls", b"1")
        add("hard.jpg", type_=tarfile.LNKTYPE, link="../../../etc/passwd")
        add("hard.cls", b"1")
        add("device.jpg", type_=tarfile.CHRTYPE)
        add("pipe.jpg", type_=tarfile.FIFOTYPE)
        add(str(outside / "folder"), type_=tarfile.DIRTYPE)
        add("bomb.png", bomb_png())
        add("bomb.cls", b"1")
        add("eps.jpg", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(x) (w) file\n")
        add("eps.cls", b"1")


def everything_below(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def test_nothing_of_a_hostile_tar_is_run_or_written(tmp_path: Path, nearfar: Callable[..., Answer]) -> None:
    outside, tars = tmp_path / "outside", tmp_path / "deep" / "tars"
    outside.mkdir()
    tars.mkdir(parents=True)
    hostile_tar(tars, outside)
    index = nearfar("index", tars)
    assert index.code == 0, index
    assert nearfar("verify", tars).code == 0
    assert nearfar("inspect", tars, "--sheet", tmp_path / "sheet.png").code == 0
    packed = nearfar("pack", tars / "a.tar", tmp_path / "packed")
    assert packed.code == 0, packed
    assert nearfar("verify", tmp_path / "packed").code == 0
    for folder in (tars, tmp_path / "packed"):
        manifest = Manifest.open(folder)
        assert manifest.num_samples == 5  # the images that are none are left out; the names harm nobody
        assert all(batch.valid.all() for batch in take(manifest, settings(batch=5), 2))
    assert "\x1b" not in index.err + packed.err + "".join(Manifest.open(tars).keys(0))
    assert not any(outside.iterdir())
    manifest_files = {"manifest.json", "shards.parquet", "runs.parquet", "classes.parquet", "samples", "samples/00000.parquet"}
    assert everything_below(tars) == {"a.tar", "rejected.jsonl", *manifest_files}
    assert everything_below(tmp_path / "packed") == {"000000.tar", "rejected.jsonl", *manifest_files}
    assert {path.name for path in tmp_path.iterdir()} == {"outside", "deep", "packed", "sheet.png"}


@pytest.mark.parametrize("size", [2**40, 2**62, 2**70])
def test_a_gigantic_claim_takes_no_memory(tmp_path: Path, nearfar: Callable[..., Answer], size: int) -> None:
    info = tarfile.TarInfo("a.jpg")
    info.size = size
    (tmp_path / "a.tar").write_bytes(info.tobuf(tarfile.GNU_FORMAT) + bytes(2048))
    for command in (["index", tmp_path, "--kind", "labelled"], ["pack", tmp_path, tmp_path / "out"]):
        answer = nearfar(*command)
        assert answer.code == 2
        assert "a.tar" in answer.err
        assert "at byte 0" in answer.err


def test_the_payload_of_this_test_would_run(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Payload(tmp_path / "run")))
    assert (tmp_path / "run").exists()
