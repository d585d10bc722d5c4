"""Every way in which a data set can be damaged, found and named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet
import pytest

from pipelines.index import index
from pipelines.manifest import Manifest
from pipelines.parallel import Map, in_process, process_map
from pipelines.records import KINDS
from pipelines.verify import verify
from pipelines.verify_shard import Fault
from tests.conftest import Answer
from tests.pipelines.tars import jpeg, stock_samples, write_stock

Row = tuple[str, int, int]  # key, offset of the first image, offset of the record


@pytest.fixture
def damaged(many_shards: Manifest, tmp_path: Path) -> Path:
    """A copy to be damaged."""
    return Path(shutil.copytree(many_shards.path, tmp_path / "set"))


def edit(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def flip(path: Path, offset: int) -> None:
    edit(path, offset, bytes([path.read_bytes()[offset] ^ 1]))


def rows(manifest: Manifest, shard: int) -> list[Row]:
    table = manifest.table(shard)
    return list(zip(manifest.keys(shard), table.offset.tolist(), manifest.column(shard, "offset_record"), strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_sound_tars_made_elsewhere_have_no_faults(tmp_path: Path, kind: str) -> None:
    write_stock(tmp_path, stock_samples(kind, 15))
    index([tmp_path])
    assert_sound(tmp_path)


@pytest.mark.parametrize("workers", [1, 2])
def test_sound_shards_have_no_faults(many_shards: Manifest, workers: int) -> None:
    assert_sound(many_shards.path, process_map(2) if workers == 2 else in_process)


def assert_sound(path: Path, map: Map = in_process) -> None:
    told: list[tuple[int, int | None]] = []
    verdict = verify(path, map=map, progress=lambda done, total: told.append((done, total)))
    manifest = Manifest.open(path)
    assert verdict.faults == []
    assert (verdict.records, verdict.images) == (manifest.num_samples, manifest.num_images)
    assert verdict.nbytes == sum(file.stat().st_size for file in path.glob("*.tar"))
    assert told == [(shard + 1, verdict.shards) for shard in range(verdict.shards)]


def flipped_byte(path: Path, records: list[Row]) -> list[tuple[str, int, str]]:
    flip(path, records[2][1] + 50)
    return [(records[2][0], records[2][1], "CRC32"), ("", 0, "SHA-256")]


def flipped_header(path: Path, records: list[Row]) -> list[tuple[str, int, str]]:
    flip(path, records[2][2] + 2)
    return [(records[2][0], records[2][2], "bad checksum"), ("", 0, "SHA-256")]


def zeroed_header(path: Path, records: list[Row]) -> list[tuple[str, int, str]]:
    edit(path, records[1][1] - 512, bytes(512))
    return [(records[1][0], records[1][1] - 512, "zeroed here"), ("", 0, "SHA-256")]


def wrong_name(path: Path, records: list[Row]) -> list[tuple[str, int, str]]:
    """A sound header, of another record."""
    data = path.read_bytes()
    edit(path, records[1][1] - 512, data[records[0][1] - 512 :][:512])
    return [
        (records[1][0], records[1][1] - 512, "another record"),
        (records[1][0], records[1][1], "no member of"),
        ("", 0, "SHA"),
    ]


def cut_inside(path: Path, records: list[Row]) -> list[tuple[str, int, str]]:
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[: records[-2][1] + 20])
    shorter = records[-2][1] + 20
    return [*((key, start, "cut off") for key, _, start in records[-2:]), ("", shorter, f"{shorter} bytes, not {size}")]


def cut_at_border(path: Path, records: list[Row]) -> list[tuple[str, int, str]]:
    path.write_bytes(path.read_bytes()[: records[-1][2]])
    return [(records[-1][0], records[-1][2], "cut off"), ("", records[-1][2], "bytes, not")]


def missing(path: Path, records: list[Row]) -> list[tuple[str, int, str]]:
    path.unlink()
    return [("", 0, "No such file")]


def empty(path: Path, records: list[Row]) -> list[tuple[str, int, str]]:
    path.write_bytes(b"")
    return [*((key, start, "cut off") for key, _, start in records), ("", 0, "0 bytes, not")]


def end_marker(path: Path, records: list[Row]) -> list[tuple[str, int, str]]:
    flip(path, path.stat().st_size - 1)
    return [("", 0, "SHA-256")]


@pytest.mark.parametrize(
    "damage", [flipped_byte, flipped_header, zeroed_header, wrong_name, cut_inside, cut_at_border, missing, empty, end_marker]
)
def test_a_damaged_shard_is_named_with_key_and_offset(
    damaged: Path, damage: Callable[[Path, list[Row]], list[tuple[str, int, str]]]
) -> None:
    manifest = Manifest.open(damaged)
    expected = damage(manifest.shard_path(2), rows(manifest, 2))
    faults = verify(damaged).faults
    assert [(fault.shard, fault.key, fault.offset) for fault in faults] == [("000002.tar", key, at) for key, at, _ in expected]
    for fault, (_, _, words) in zip(faults, expected, strict=True):
        assert words in fault.reason


def test_a_shard_in_the_place_of_another_is_found(damaged: Path) -> None:
    shutil.copy(damaged / "000001.tar", damaged / "000002.tar")
    faults = verify(damaged).faults
    assert {fault.shard for fault in faults} == {"000002.tar"}
    assert {key for key, _, _ in rows(Manifest.open(damaged), 2)} <= {fault.key for fault in faults}


def test_a_shard_that_is_not_in_the_manifest_is_found(damaged: Path) -> None:
    shutil.copy(damaged / "000001.tar", damaged / "left over.tar")
    assert verify(damaged).faults == [Fault("left over.tar", "", 0, "the manifest does not have this shard")]


@pytest.mark.parametrize("table", ["shards.parquet", "runs.parquet", "classes.parquet", "samples/00000.parquet"])
def test_damaged_and_missing_tables_are_found(damaged: Path, table: str) -> None:
    data = (damaged / table).read_bytes()
    sound, noticed = pyarrow.parquet.read_table(damaged / table), 0
    for position in range(4, len(data), len(data) // 15):
        (damaged / table).write_bytes(data[:position] + bytes([data[position] ^ 0xFF]) + data[position + 1 :])
        faults = verify(damaged).faults
        noticed += bool(faults)
        assert faults or pyarrow.parquet.read_table(damaged / table).equals(sound)  # a flipped statistic changes nothing
    assert noticed > 5
    (damaged / table).unlink()
    faults = verify(damaged).faults
    assert any(table.endswith(fault.shard) or table in fault.reason for fault in faults)


def test_tables_that_contradict_each_other_are_found(damaged: Path, labelled: Manifest) -> None:
    for name in ("runs.parquet", "classes.parquet"):
        shutil.copy(labelled.path / name, damaged / name)
    about = json.loads((damaged / "manifest.json").read_text())
    (damaged / "manifest.json").write_text(json.dumps({**about, "num_samples": 57}))
    assert {fault.shard for fault in verify(damaged).faults} == {"runs.parquet", "manifest.json"}  # the classes are the same
    (damaged / "manifest.json").write_text("{}")
    assert {fault.shard for fault in verify(damaged).faults} == {"manifest.json"}


def test_an_image_that_was_damaged_before_it_was_indexed_is_found(tmp_path: Path) -> None:
    samples = stock_samples("pair", 4)
    samples[1]["positive.jpg"] = jpeg(1)[:-200]  # its header is sound, and that is all that `index` looks at
    write_stock(tmp_path, samples)
    assert index([tmp_path]).records == 4
    (fault,) = verify(tmp_path).faults
    assert (fault.shard, fault.key) == ("s-000.tar", "part/00001")
    assert fault.offset == Manifest.open(tmp_path).table(0).offset[3]
    assert "damaged" in fault.reason


def test_the_command_exits_with_1_when_anything_is_bad(damaged: Path, nearfar: Callable[..., Answer]) -> None:
    answer = nearfar("verify", damaged, "--json")
    assert (answer.code, json.loads(answer.out)["good"]) == (0, True)
    flip(damaged / "000002.tar", rows(Manifest.open(damaged), 2)[2][1] + 9)
    answer = nearfar("verify", damaged)
    assert answer.code == 1
    assert f"000002.tar {rows(Manifest.open(damaged), 2)[2][0]} at byte" in answer.out
    assert "2 faults" in answer.out
    assert len(json.loads(nearfar("verify", damaged, "--json").out)["faults"]) == 2
    answer = nearfar("verify", damaged / "samples")
    assert answer.code == 2
    assert "no manifest.json" in answer.err
