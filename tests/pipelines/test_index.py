"""Tars written by stock webdataset: their manifest, and training on them."""

from __future__ import annotations

import io
import json
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow.parquet
import pytest
import webdataset as wds

from pipelines.hashing import hash_bytes, hash_entity
from pipelines.index import index
from pipelines.manifest import Manifest
from pipelines.pack import pack
from pipelines.parallel import process_map
from pipelines.records import KINDS
from pipelines.sources.tars import list_tars
from pipelines.tar_urls import expand_tars
from tests.conftest import Answer
from tests.pipelines.conftest import paint
from tests.pipelines.streams import settings, take
from tests.pipelines.tars import encode, jpeg, stock_samples, write_stock


def all_rows(manifest: Manifest) -> list[dict[str, Any]]:
    """The samples tables as pyarrow reads them."""
    files = sorted((manifest.path / "samples").iterdir())
    return [row for file in files for row in pyarrow.parquet.read_table(file).to_pylist()]


def images_of(sample: dict[str, Any]) -> list[bytes]:
    """In the order of views."""
    order = [
        "jpg",
        "anchor.jpg",
        "left.jpg",
        "positive.jpg",
        "right.jpg",
        "negative.jpg",
        *(f"negative{n}.jpg" for n in range(8)),
    ]
    return [sample[name] for name in order if name in sample]


@pytest.mark.parametrize("kind", KINDS)
def test_every_record_of_stock_tars_is_found_as_it_was_written(tmp_path: Path, kind: str) -> None:
    samples = stock_samples(kind, 25)
    paths = write_stock(tmp_path, samples)
    summary = index([str(tmp_path / "s-{000..002}.tar")])
    assert (summary.kind, summary.records, summary.shards, summary.rejected, summary.out) == (kind, 25, 3, [], tmp_path)
    manifest = Manifest.open(tmp_path)
    assert [manifest.shard_path(shard) for shard in range(3)] == paths
    assert manifest.sizes.tolist() == [10, 10, 5]
    for number, (row, sample) in enumerate(zip(all_rows(manifest), samples, strict=True)):
        data = paths[number // 10].read_bytes()
        about, images = sample["json"], images_of(sample)
        assert row["key"] == sample["__key__"]
        assert [data[at : at + size] for at, size in zip(row["offset"], row["size"], strict=True)] == images
        assert row["uid"] == [hash_bytes(image) for image in images]
        assert set(row["width"]) == {40}
        assert set(row["height"]) == {32}
        assert row["view"] == list(range(len(images)))
        assert row["match"] == about.get("match", -1)
        assert row["weight"] == about.get("weight", 1.0)
        entity = str(sample["cls"]) if kind == "labelled" else about.get("group", f"\0{sample['__key__']}")
        assert row["group"][0] == hash_entity(entity)
        assert row["group"][2:] == [hash_entity(name) for name in about.get("negative_groups", [])]
        if kind == "labelled_pair":
            assert (row["group"][0] == row["group"][1]) == bool(about["match"])
        with tarfile.open(fileobj=io.BytesIO(data[row["offset_record"] :][: row["nbytes_record"]] + bytes(1024))) as tar:
            assert {name.partition(".")[0] for name in tar.getnames()} == {sample["__key__"]}


@pytest.mark.parametrize("kind", KINDS)
def test_the_loader_trains_on_stock_tars(tmp_path: Path, kind: str) -> None:
    samples = stock_samples(kind, 25)
    write_stock(tmp_path, samples)
    index([tmp_path])
    batches = take(Manifest.open(tmp_path), settings(batch=5), 5)
    assert all(batch.valid.all() for batch in batches)
    seen = sorted(uid for batch in batches for uid in batch.uid.tolist())
    assert seen == sorted(hash_bytes(image) for sample in samples for image in images_of(sample))
    if kind == "labelled":
        names = {hash_bytes(sample["jpg"]): hash_entity(str(sample["cls"])) for sample in samples}
        for batch in batches:
            assert batch.group.tolist() == [names[uid] for uid in batch.uid.tolist()]


@pytest.mark.parametrize("source", ["folder", "glob", "one tar"])
def test_tars_are_packed_anew_for_balanced_batches(tmp_path: Path, source: str) -> None:
    samples = stock_samples("labelled", 25)
    write_stock(tmp_path / "in", samples, per_tar=25 if source == "one tar" else 10)
    given = {"folder": tmp_path / "in", "glob": tmp_path / "in" / "s-*.tar", "one tar": tmp_path / "in" / "s-000.tar"}[source]
    pack(given, tmp_path / "out")
    names = {hash_bytes(sample["jpg"]): hash_entity(str(sample["cls"])) for sample in samples}
    seen = set()
    for batch in take(Manifest.open(tmp_path / "out"), settings(batch=10, per_class=5), 3):
        assert batch.group.tolist() == [names[uid] for uid in batch.uid.tolist()]
        assert all(len(set(batch.group[unit : unit + 5].tolist())) == 1 for unit in (0, 5))
        seen |= set(batch.uid[batch.valid].tolist())
    assert seen == set(names)


@pytest.mark.parametrize("kind", ["pair", "labelled_pair", "triplet"])
def test_tars_of_the_other_kinds_are_packed(tmp_path: Path, kind: str) -> None:
    samples = stock_samples(kind, 12)
    write_stock(tmp_path / "in", samples)
    pack(tmp_path / "in", tmp_path / "out", kind=kind)
    rows = {tuple(row["uid"]): row for row in all_rows(Manifest.open(tmp_path / "out"))}
    for sample in samples:
        row = rows.pop(tuple(hash_bytes(image) for image in images_of(sample)))
        assert row["match"] == sample["json"].get("match", -1)
        assert row["weight"] == sample["json"].get("weight", 1.0)
        assert row["label"] == sample["json"].get("group")
    assert not rows
    with pytest.raises(ValueError, match=rf"no record of kind 'labelled'.*look like '{kind}'"):
        pack(tmp_path / "in", tmp_path / "other")


def test_what_lacks_something_is_left_out_and_told(tmp_path: Path) -> None:
    good = stock_samples("labelled", 6)
    bad: dict[str, tuple[dict[str, bytes], str]] = {
        "no image": ({"cls": b"1", "txt": b""}, "no image"),
        "no label": ({"jpg": jpeg(1), "json": b"{}"}, "no label"),
        "empty label": ({"jpg": jpeg(1), "cls": b" "}, "empty"),
        "binary label": ({"jpg": jpeg(1), "cls": b"\xff\xfe"}, "no text"),
        "two images": ({"jpg": jpeg(1), "png": encode(paint(1), "PNG"), "cls": b"1"}, "one image is expected"),
        "web page": ({"jpg": b"<html></html>", "cls": b"1"}, "jpg: not an image"),
        "empty": ({"jpg": b"", "cls": b"1"}, "jpg: the file is empty"),
        "json": ({"jpg": jpeg(1), "json": b"{"}, ".json cannot be read"),
        "deep": ({"jpg": jpeg(1), "json": b"[" * 100_000}, ".json cannot be read"),
        "weight": ({"jpg": jpeg(1), "cls": b"1", "json": b'{"weight": NaN}'}, "weight"),
        "surrogate": ({"jpg": jpeg(1), "json": b'{"label": "\\ud800"}'}, "surrogates"),
        "list": ({"jpg": jpeg(1), "json": b'{"label": [1]}'}, "neither text nor an integer"),
    }
    with wds.TarWriter(str(tmp_path / "a.tar")) as tar:
        for sample in good:
            tar.write(sample)
        for key, (members, _) in bad.items():
            tar.write({"__key__": key, **members})
    summary = index([tmp_path / "a.tar"])
    assert summary.records == 6
    lines = [json.loads(line) for line in (tmp_path / "rejected.jsonl").read_text().splitlines()]
    assert [line["key"] for line in lines] == list(bad)
    for line in lines:
        assert line["shard"] == "a.tar"
        assert bad[line["key"]][1] in line["reason"]
    assert Manifest.open(tmp_path).keys(0) == [sample["__key__"] for sample in good]
    packed = pack(tmp_path / "a.tar", tmp_path / "packed")
    assert (packed.records, len(packed.rejected)) == (6, len(bad))
    assert not [name for name, _ in packed.rejected if not name.startswith("a.tar/")]


def test_a_damaged_tar_is_refused_or_salvaged(tmp_path: Path) -> None:
    paths = write_stock(tmp_path, stock_samples("pair", 20))
    with tarfile.open(paths[1]) as tar:
        at = tar.getmember("part/00014.json").offset
    data = paths[1].read_bytes()
    paths[1].write_bytes(data[:at] + bytes(512) + data[at + 512 :])
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ValueError, match=rf"1 tars cannot .*s-001\.tar at byte {at}: a header is zeroed"):
        index([tmp_path], out=tmp_path / "new")
    assert sorted(tmp_path.iterdir()) == before
    summary = index([tmp_path], salvage=True)
    assert summary.records == 14  # 00014 itself was not complete yet
    assert [(one.shard, one.offset) for one in summary.damaged] == [("s-001.tar", at)]
    assert all(batch.valid.all() for batch in take(Manifest.open(tmp_path), settings(batch=7), 2))


def test_a_key_in_two_tars_is_refused_unless_tars_have_keys_of_their_own(tmp_path: Path) -> None:
    for name in ("one", "two"):
        with wds.TarWriter(str(tmp_path / f"{name}.tar")) as tar:
            for i in range(3):
                seed = i + 100 * len(name) * (name == "two")
                tar.write(
                    {
                        "__key__": f"{name}{i}" if i < 2 else "both",
                        "anchor.jpg": jpeg(seed),
                        "positive.jpg": jpeg(seed + 50),
                        "json": {"group": ""},
                    }
                )
    with pytest.raises(ValueError, match=r"'both' is in one\.tar at byte \d+ and two\.tar at byte \d+.*--keys-per-tar"):
        index([tmp_path])
    index([tmp_path], keys_per_tar=True)
    rows = all_rows(Manifest.open(tmp_path))
    assert [row["key"] for row in rows] == ["one/one0", "one/one1", "one/both", "two/two0", "two/two1", "two/both"]
    assert len({row["group"][0] for row in rows}) == 6  # of one group, they would never be each other's negatives


def test_only_a_manifest_of_these_tars_is_replaced(tmp_path: Path) -> None:
    paths = write_stock(tmp_path, stock_samples("labelled", 30))
    index(paths[:2])
    first = Manifest.open(tmp_path)
    index(paths[:2])
    assert Manifest.open(tmp_path).digest == first.digest
    index(paths)  # grown
    grown = Manifest.open(tmp_path)
    assert grown.sizes.tolist() == [*first.sizes, 10]
    assert [grown.sha256(shard) for shard in range(2)] == [first.sha256(shard) for shard in range(2)]
    for others in (paths[:2], paths[::-1]):
        with pytest.raises(ValueError, match="holds a manifest of other tars"):
            index(others)
    pack(tmp_path, tmp_path / "packed")
    with pytest.raises(ValueError, match="holds a packed data set"):
        index([tmp_path / "packed"])
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith(".")) == []


def test_processes_write_the_same_manifest(tmp_path: Path) -> None:
    paths = write_stock(tmp_path / "tars", stock_samples("triplet", 30))
    told: list[tuple[int, int | None]] = []
    index(paths, out=tmp_path / "one")
    index(paths, out=tmp_path / "two", map=process_map(2), progress=lambda done, total: told.append((done, total)))
    one, two = ({p.name: p.read_bytes() for p in (tmp_path / n).rglob("*") if p.is_file()} for n in ("one", "two"))
    assert one == two
    assert told == [(1, 3), (2, 3), (3, 3)]
    assert take(Manifest.open(tmp_path / "one"), settings(batch=6), 1)[0].valid.all()  # from another folder


def test_tars_are_found_by_globs_ranges_folders_and_urls(tmp_path: Path) -> None:
    paths = [str(path) for path in write_stock(tmp_path, stock_samples("labelled", 30))]
    assert expand_tars([tmp_path]) == expand_tars([tmp_path / "s-*.tar"]) == expand_tars(paths) == paths
    assert expand_tars([tmp_path / "s-{002..000}.tar"]) == paths[::-1]
    for given, words in ((tmp_path / "t-*.tar", "matches nothing"), (tmp_path / "s-{000..009}.tar", "s-003.tar' is no file")):
        with pytest.raises(ValueError, match=words):
            expand_tars([given])
    with pytest.raises(ValueError, match="comes twice"):
        expand_tars([tmp_path, paths[1]])
    memory = fsspec.filesystem("memory")
    for path in paths:
        memory.pipe(f"/{tmp_path.name}/{Path(path).name}", Path(path).read_bytes())
    urls = [f"memory://{tmp_path.name}/s-{{000..002}}.tar"]
    with pytest.raises(ValueError, match="say with --out DIR"):
        index(urls)
    index(urls, out=tmp_path / "remote")
    index(paths, out=tmp_path / "local")
    assert all_rows(Manifest.open(tmp_path / "remote")) == all_rows(Manifest.open(tmp_path / "local"))
    listed = list_tars(f"memory://{tmp_path.name}/s-*.tar", "labelled").records
    assert [pickle.loads(pickle.dumps(record)).images[0].read() for record in listed] == [jpeg(i) for i in range(30)]


@pytest.mark.parametrize("members", [{"txt": "x"}, {"jpg": b"x", "txt": "caption"}, {"anchor.jpg": b"x"}])
def test_an_unknown_kind_tells_what_was_seen(tmp_path: Path, members: dict[str, Any]) -> None:
    with wds.TarWriter(str(tmp_path / "a.tar")) as tar:
        tar.write({"__key__": "some", **members})
    with pytest.raises(ValueError, match=f"'some' has the members {', '.join(members)}. Needed are"):
        index([tmp_path])


def test_the_command_tells_what_became_of_the_tars(tmp_path: Path, nearfar: Callable[..., Answer]) -> None:
    write_stock(tmp_path, stock_samples("labelled", 20))
    answer = nearfar("index", tmp_path / "s-*.tar", "--json", "--workers", 1)
    found = json.loads(answer.out)
    assert (answer.code, found["records"], found["classes"], found["passed"]) == (0, 20, 5, {".txt": 20})
    assert "data.per_class" in answer.err
    assert nearfar("index", tmp_path / "none.tar").code == 2
    assert np.array_equal(Manifest.open(tmp_path).sizes, [10, 10])
