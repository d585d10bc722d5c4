"""Vectors in place of images, and targets of records: out of tables and tars, or refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import webdataset as wds
from PIL import Image

from pipelines.index import index
from pipelines.manifest import Manifest
from pipelines.pack import pack
from pipelines.sources.table import list_table
from pipelines.vectors import decode_vector
from pipelines.verify import verify
from tests.pipelines.streams import settings, take
from tests.pipelines.test_npy import Evil, save
from tests.pipelines.vectors import (
    COUNT,
    DIM,
    PLAIN,
    SIDE,
    TARGET_DIM,
    Truth,
    assert_true,
    encode,
    make_truth,
    write_files,
    write_tars,
)


@pytest.fixture(scope="module")
def truth() -> Truth:
    return make_truth()


@pytest.mark.parametrize("how", ["index", "pack"])
def test_stock_tars_give_the_same_batches(truth: Truth, tmp_path: Path, how: str) -> None:
    tars = write_tars(tmp_path / "tars", truth)
    out = tmp_path / "out"
    if how == "index":
        summary = index(sorted(tars.glob("*.tar")), out=out)
        assert (summary.kind, summary.rejected) == ("triplet", [])
        assert not any(name.endswith("npy") for name in summary.passed)
    else:
        assert not pack(tars, out, kind="triplet").rejected
    manifest = Manifest.open(out)
    assert (manifest.vector_dim, manifest.target_dim) == (DIM, TARGET_DIM)
    assert sorted(assert_true(take(manifest, settings(image_size=SIDE, augment=PLAIN, batch=11), 2), truth)) == [*range(COUNT)]
    assert not verify(out).faults


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl"])
@pytest.mark.parametrize("kind", ["list", "fixed", "half"])
def test_lists_of_numbers_in_tables_are_vectors(truth: Truth, tmp_path: Path, suffix: str, kind: str) -> None:
    number = np.float16 if kind == "half" else np.float32
    types = {"list": pa.list_(pa.float64()), "fixed": pa.list_(pa.float32(), DIM), "half": pa.large_list(pa.float16())}
    ragged = pa.list_(pa.float32())  # Arrow cannot read lists of a fixed size from Parquet where some are missing
    images = [next(member for member in members if member.ndim == 3) for members in truth.members]
    for i, image in enumerate(images):
        Image.fromarray(image).save(tmp_path / f"{i}.png")
    positive, one, other = np.random.default_rng(3).standard_normal((3, COUNT, DIM)).astype(number)
    columns = {
        "anchor": [f"{i}.png" for i in range(COUNT)],
        "positive": pa.array(list(positive), types[kind]),
        "negative0": pa.array(list(one), types[kind]),
        "negative1": pa.array([None if i % 3 else row.astype(np.float32) for i, row in enumerate(other)], ragged),
        "target": pa.array(list(truth.targets), ragged),
        "group": [f"g{i}" for i in range(COUNT)],
    }
    table, path = pa.table(columns), tmp_path / f"t{suffix}"
    if suffix == ".parquet":
        pyarrow.parquet.write_table(table, path, row_group_size=7)
    else:
        path.write_text("".join(json.dumps(row, default=float) + "\n" for row in table.to_pylist()))
    members = [[images[i], positive[i], one[i], *([] if i % 3 else [other[i]])] for i in range(COUNT)]
    pack(path, tmp_path / "out", kind="triplet")
    manifest = Manifest.open(tmp_path / "out")
    batches = take(manifest, settings(image_size=SIDE, augment=PLAIN, batch=11), 2)
    assert sorted(assert_true(batches, Truth(members, truth.targets))) == list(range(COUNT))
    listed = list_table(path, "triplet").records  # without a copy of the table's cells
    for i, record in enumerate(listed):
        np.testing.assert_array_equal(decode_vector(record.images[1].read()), positive[i])
        np.testing.assert_array_equal(decode_vector(record.files[-1].read()), truth.targets[i])
    pack(path, tmp_path / "again", kind="triplet")
    assert Manifest.open(tmp_path / "again").digest == manifest.digest


def test_files_that_would_run_something_are_left_out(truth: Truth, tmp_path: Path) -> None:
    array = np.empty(1, dtype=object)
    array[0] = Evil(tmp_path / "made")
    table = write_files(tmp_path, truth)
    (tmp_path / "1-1.npy").write_bytes(save(array, pickle=True))
    (tmp_path / "2-target.npy").write_bytes(save(array, pickle=True))
    summary = pack(table, tmp_path / "out", kind="triplet")
    assert sorted(name for name, _ in summary.rejected) == ["1-1.npy", "2-target.npy"]
    assert summary.records == COUNT - 2
    tars = tmp_path / "tars"
    tars.mkdir()
    with wds.TarWriter(str(tars / "a.tar")) as writer:
        for i in range(3):
            vector = save(array, pickle=True) if i == 1 else save(np.ones(DIM, np.float32))
            writer.write({"__key__": str(i), "anchor.png": encode(truth.members[1][0])[1], "positive.npy": vector})
    found = index([tars / "a.tar"], kind="pair")
    assert [(one.key, "never read" in one.reason) for one in found.rejected] == [("1", True)]
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("what", ["vectors", "targets", "missing"])
def test_data_sets_of_several_lengths_are_refused(truth: Truth, tmp_path: Path, what: str) -> None:
    samples = []
    for i in range(3):
        size, target = (4 if what == "vectors" and i == 2 else 3), (7 if what == "targets" and i == 2 else 6)
        sample = {"__key__": f"k{i}", "anchor.png": encode(truth.members[1][0])[1], "positive.npy": np.ones(size, np.float32)}
        samples.append(sample if what == "missing" and i == 2 else sample | {"target.npy": np.ones(target, np.float32)})
    with wds.TarWriter(str(tmp_path / "a.tar")) as writer:
        for sample in samples:
            writer.write(sample)
    before = {path.name for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match=r"that of k2 .*(missing|4 numbers|7 numbers), those before it"):
        index([tmp_path / "a.tar"], kind="pair")
    with pytest.raises(ValueError, match=r"those before it are (missing|of \d numbers)"):
        pack(tmp_path / "a.tar", tmp_path / "out", kind="pair")
    assert {path.name for path in tmp_path.iterdir()} == before, "nothing is left behind"


def test_records_of_vectors_only_are_left_out(truth: Truth, tmp_path: Path) -> None:
    image, vector = encode(truth.members[1][0])[1], np.ones(DIM, np.float32)
    with wds.TarWriter(str(tmp_path / "a.tar")) as writer:
        writer.write({"__key__": "good", "anchor.png": image, "positive.npy": vector})
        writer.write({"__key__": "bad", "anchor.npy": vector, "positive.npy": vector})
    assert [(one.key, one.reason) for one in index([tmp_path / "a.tar"], kind="pair").rejected] == [
        ("bad", "no image in the record, only vectors")
    ]
    np.save(tmp_path / "v.npy", vector)
    (tmp_path / "i.png").write_bytes(image)
    (tmp_path / "t.csv").write_text("anchor,positive\ni.png,v.npy\nv.npy,v.npy\n")
    summary = pack(tmp_path / "t.csv", tmp_path / "out", kind="pair")
    assert summary.rejected == [("v.npy", "no image in the record, only vectors")]


def test_other_peoples_arrays_beside_labelled_images_are_passed_over(truth: Truth, tmp_path: Path) -> None:
    with wds.TarWriter(str(tmp_path / "a.tar")) as writer:
        for i in range(4):
            image = encode(truth.members[1][0])[1]
            writer.write({"__key__": f"k{i}", "png": image, "cls": i % 2, "npy": np.ones((2, 2)), "depth.npy": np.ones(3)})
    found = index([tmp_path / "a.tar"])
    assert (found.kind, found.records, found.passed[".npy"]) == ("labelled", 4, 8)
    manifest = Manifest.open(found.out)
    assert (manifest.vector_dim, manifest.target_dim) == (0, 0)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"positive": [[1.0, 2.0], [1.0, float("nan")]]}, "column positive, row 1: expected finite|Number too big"),
        ({"positive": [[1.0, 2.0], [1.0, 1e300]]}, "column positive, row 1: expected finite"),
        ({"positive": [[1.0, 2.0], [1.0, None]]}, "column positive, row 1: expected finite"),
        ({"positive": [[1.0, 2.0], [1.0, 2.0, 3.0]]}, "column positive, row 1: expected a list of 2 numbers, got 3"),
        ({"positive": [[], [1.0]]}, "column positive, row 0: expected a list of one or more"),
        ({"positive": [[1.0], None]}, "row 1: no positive"),
        ({"anchor": [[1.0], [2.0]], "positive": [[1.0], [2.0]]}, "row 0: only vectors in anchor, positive; every record needs"),
        ({"positive": [["a"], ["b"]]}, "column positive .* must hold paths, image bytes or vectors"),
        ({"positive": ["a.png", "b.png"], "target": [[1.0, 2.0], None]}, "row 1: no target"),
        ({"positive": ["a.png", "b.png"], "target": [[1.0, 2.0], [3.0]]}, "column target, row 1: expected a list of 2"),
        ({"positive": ["a.png", "b.png"], "target": ["a.npy", ""]}, "row 1: no target"),
    ],
)
@pytest.mark.parametrize("suffix", [".parquet", ".jsonl"])
def test_lists_that_are_no_vectors_are_refused_by_row(
    tmp_path: Path, suffix: str, columns: dict[str, list[Any]], message: str
) -> None:
    table, path = pa.table({"anchor": ["a.png", "b.png"], **columns}), tmp_path / f"t{suffix}"
    if suffix == ".parquet":
        pyarrow.parquet.write_table(table, path, row_group_size=1)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in table.to_pylist()).replace("NaN", "1e999"))
    with pytest.raises(ValueError, match=message):
        pack(path, tmp_path / "out", kind="pair")
    assert not (tmp_path / "out").exists()


def test_a_column_target_of_something_else_is_not_looked_at(truth: Truth, tmp_path: Path) -> None:
    for i in range(4):
        (tmp_path / f"{i}.png").write_bytes(encode(truth.members[i + 1][0])[1] if i != 3 else encode(truth.members[4][1])[1])
    for name, values in {"numbers": [0, 1, 0, 1], "texts": ["cat", "dog", "cat", "dog"]}.items():
        table = pa.table({"image": [f"{i}.png" for i in range(4)], "label": ["a", "b"] * 2, "target": values})
        pyarrow.parquet.write_table(table, tmp_path / f"{name}.parquet")
        assert not pack(tmp_path / f"{name}.parquet", tmp_path / name).rejected
        assert Manifest.open(tmp_path / name).target_dim == 0
