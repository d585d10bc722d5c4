"""Records listed in tables."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest
from PIL import Image

from pipelines.columns import ColumnRecords, entity_names, entity_numbers
from pipelines.hashing import hash_bytes, hash_entity
from pipelines.manifest import Manifest
from pipelines.pack import pack
from pipelines.records import MEMBERS, LocalFile, Record, make_key, member_groups
from pipelines.sources.table import list_table

Painter = Callable[..., Image.Image]
MakeClasses = Callable[[Path, dict[str, int]], Path]


def write_table(path: Path, columns: dict[str, list[Any]]) -> Path:
    table = pa.table(columns)
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(table, path)
    elif path.suffix == ".csv":
        rows = [list(columns), *zip(*columns.values(), strict=True)]
        path.write_text("".join(",".join("" if v is None else str(v) for v in row) + "\n" for row in rows), "utf-8")
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in table.to_pylist()), "utf-8")
    return path


@pytest.fixture
def pictures(tmp_path: Path, painter: Painter) -> list[str]:
    (tmp_path / "im").mkdir()
    for i in range(8):
        painter(i).save(tmp_path / "im" / f"p {i}.png")
    return [f"im/p {i}.png" for i in range(8)]


@pytest.mark.parametrize("suffix", [".parquet", ".csv", ".jsonl"])
def test_tables_of_every_kind_and_format_are_packed(tmp_path: Path, pictures: list[str], suffix: str) -> None:
    columns: dict[str, dict[str, list[Any]]] = {
        "labelled": {"image": pictures[:4], "label": ["007", "b", "007", "b"]},
        "pair": {"anchor": pictures[:2], "positive": pictures[2:4], "group": ["g", "h"]},
        "labelled_pair": {"left": pictures[:2], "right": pictures[2:4], "match": [1, 0]},
        "triplet": {
            "anchor": pictures[:2],
            "positive": pictures[2:4],
            "negative0": pictures[4:6],
            "negative1": [pictures[6], None],
            "weight": [0.5, 2.0],
        },
    }
    for kind, values in columns.items():
        path = write_table(tmp_path / f"{kind}{suffix}", values)
        summary = pack(path, tmp_path / kind, kind=kind)
        assert not summary.rejected
        manifest = Manifest.open(tmp_path / kind)
        table = manifest.table(0)
        number = {hash_bytes((tmp_path / name).read_bytes()): i for i, name in enumerate(pictures)}
        rows = {
            tuple(number[uid] for uid in table.uid[table.start[i] : table.start[i + 1]].tolist()): i
            for i in range(manifest.num_samples)
        }
        if kind == "labelled":
            assert sorted(manifest.class_counts.values()) == [2, 2]
            assert set(manifest.class_names.values()) == {"007", "b"}
        elif kind == "pair":
            assert set(rows) == {(0, 2), (1, 3)}
            assert set(table.group.tolist()) == {hash_entity("g"), hash_entity("h")}
        elif kind == "labelled_pair":
            assert {members: int(table.match[i]) for members, i in rows.items()} == {(0, 2): 1, (1, 3): 0}
            same = {members: len(set(table.group[2 * i : 2 * i + 2].tolist())) == 1 for members, i in rows.items()}
            assert same == {(0, 2): True, (1, 3): False}
        else:
            assert {members: float(table.weight[i]) for members, i in rows.items()} == {(0, 2, 4, 6): 0.5, (1, 3, 5): 2.0}
            assert len(set(table.group.tolist())) == 2 + 3
            assert manifest.weighted
        with tarfile.open(manifest.shard_path(0)) as tar:
            names = tar.getnames()
        assert {name.partition(".")[2].partition(".")[0] for name in names} >= set(MEMBERS[kind]) - {""}


def test_image_bytes_in_parquet_are_packed(tmp_path: Path, pictures: list[str]) -> None:
    data = [(tmp_path / name).read_bytes() for name in pictures[:4]]
    for name, column in {"bytes": data, "struct": [{"bytes": one, "path": None} for one in data]}.items():
        path = write_table(tmp_path / f"{name}.parquet", {"image": column, "label": [1, 2, 1, 2]})
        assert pack(path, tmp_path / name).records == 4
        assert set(Manifest.open(tmp_path / name).class_names.values()) == {"1", "2"}


def test_missing_files_of_a_table_are_listed(tmp_path: Path, pictures: list[str]) -> None:
    columns = {"anchor": pictures[:3], "positive": [*pictures[3:5], "im/gone.png"]}
    summary = pack(write_table(tmp_path / "t.csv", columns), tmp_path / "out", kind="pair")
    assert summary.rejected == [("im/gone.png", "no such file")]
    assert summary.records == 2


@pytest.mark.parametrize(
    ("kind", "columns", "message"),
    [
        ("pair", {"anchor": ["a"]}, "has no column positive"),
        ("triplet", {"anchor": ["a"], "positive": ["b"]}, "has no column negative"),
        ("labelled_pair", {"left": ["a"], "right": ["b"], "match": ["maybe"]}, "row 0: match must be 0 or 1"),
        ("labelled", {"image": ["a", None], "label": ["x", "y"]}, "row 1: no image"),
        ("labelled", {"image": ["a", "b"], "label": ["x", None]}, "row 1: no label"),
        ("labelled", {"image": [1, 2], "label": ["x", "y"]}, "must hold paths, image bytes or vectors"),
        ("labelled", {"image": [b"x", None], "label": ["x", "y"]}, "row 1: no image"),
        ("labelled", {"image": [[0.5], [1.5]], "label": ["x", "y"]}, "row 0: .* labelled images cannot be vectors"),
        ("triplet", {"anchor": ["a"], "positive": ["b"], "negative": [""]}, "row 0: no negative"),
        ("pair", {"anchor": ["a"], "positive": ["b"], "weight": [-1.0]}, "weight must be a number"),
    ],
)
def test_tables_that_say_too_little_are_refused(tmp_path: Path, kind: str, columns: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        list_table(write_table(tmp_path / "t.parquet", columns), kind)


def test_images_in_cells_are_read_in_any_order(tmp_path: Path, pictures: list[str]) -> None:
    """From the table itself, and from the copy that packing makes; neither holds the column in memory."""
    data = [(tmp_path / pictures[i % 8]).read_bytes() for i in range(40)]
    negatives = [None if i % 3 else data[i] for i in range(40)]
    table = pa.table({"anchor": data, "positive": [{"bytes": one, "path": "x"} for one in data[::-1]], "negative": negatives})
    table = table.append_column("negative1", pa.array(data[5:] + data[:5]))
    pyarrow.parquet.write_table(table, tmp_path / "t.parquet", row_group_size=7)
    listing = list_table(tmp_path / "t.parquet", "triplet")
    expected = [[data[i], data[39 - i], *filter(None, [negatives[i]]), (data[5:] + data[:5])[i]] for i in range(40)]
    assert listing.sizes is not None
    assert listing.sizes.sum(axis=1).tolist() == [sum(map(len, images)) for images in expected]
    assert listing.stage is not None
    for records in (listing.records, listing.stage(tmp_path), listing.stage(tmp_path)):
        for row in [39, 0, 7, 6, 20]:
            assert [image.read() for image in records[row].images] == expected[row]
    assert listing.records[3].images[1].name == "t.parquet:3:positive"


def test_empty_cells_are_no_group(tmp_path: Path, pictures: list[str]) -> None:
    columns = {"anchor": pictures[:3], "positive": pictures[3:6], "group": ["", "g", ""]}
    listing = list_table(write_table(tmp_path / "t.csv", columns), "pair")
    assert [record.entity for record in listing.records] == [None, "g", None]


def test_entities_are_numbered_by_name() -> None:
    names = ["b", None, "é", "a", "b", None, "B", *[None] * 9, "a"]
    records = [Record((LocalFile(Path("x"), "x"),), entity=name) for name in names]
    sortable = [f"1{name}" if name is not None else f"0{i}" for i, name in enumerate(names)]
    expected = [sorted(set(sortable)).index(name) for name in sortable]
    entities = pa.array(names, pa.large_string()).dictionary_encode()
    columns = ColumnRecords(len(names), [lambda row: LocalFile(Path("x"), "x")], entities=entities)
    assert list(columns) == records
    for kind in (records, columns):
        assert entity_numbers(kind).tolist() == expected
        assert entity_names(kind) == ["B", "a", "b", "é"]


def test_what_is_no_table_is_refused(tmp_path: Path) -> None:
    for name in ("t.parquet", "t.jsonl", "t.csv"):
        (tmp_path / name).write_bytes(b"\0\1\2 nonsense")
        with pytest.raises(ValueError, match=r"cannot be read|has no column"):
            list_table(tmp_path / name, "pair")
    with pytest.raises(ValueError, match="no file"):
        list_table(tmp_path / "none.csv", "pair")


def test_groups_follow_the_kind() -> None:
    images = tuple(LocalFile(Path(f"{i}.png"), f"{i}.png") for i in range(4))
    assert len(set(member_groups("triplet", Record(images), "k"))) == 3
    known = Record(images, entity="cat", negative_entities=("dog", "cat"))
    assert member_groups("triplet", known, "k") == [hash_entity(name) for name in ("cat", "cat", "dog", "cat")]
    assert member_groups("pair", Record(images[:2]), "k") != member_groups("pair", Record(images[:2]), "l")


def test_keys_are_plain_and_short() -> None:
    assert make_key(3, "dög s/ü b.v1.png") == "0000000003-u-b-v1"
    assert make_key(4, "日本.png") == "0000000004"
    assert len(make_key(10**9, "x" * 300 + ".png")) <= 64
