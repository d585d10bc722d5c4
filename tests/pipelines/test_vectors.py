"""Vectors in place of images, and targets of records: from any source through shards to batches."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
import webdataset as wds
from numpy.typing import NDArray
from PIL import Image

from configs.schema import Augment, Source
from pipelines.batch import Batch
from pipelines.hashing import hash_entity
from pipelines.index import index
from pipelines.inspect import inspect
from pipelines.manifest import Manifest
from pipelines.mixture import Mixture
from pipelines.pack import pack
from pipelines.sheet import draw_sheet
from pipelines.stream import evaluation_batches
from pipelines.verify import verify
from tests.pipelines.streams import settings, take
from tests.pipelines.test_npy import Evil, save

COUNT, SIDE, DIM, TARGET_DIM = 22, 16, 5, 3
PLAIN = Augment()


@dataclass
class Truth:
    """`members[i]` of record i in order: images [S, S, 3] uint8 or vectors [DIM] float32; `targets` [n, TARGET_DIM]."""

    members: list[list[NDArray[Any]]]
    targets: NDArray[np.float32]

    @property
    def groups(self) -> dict[int, int]:
        return {hash_entity(f"g{i}"): i for i in range(len(self.members))}


def make_truth(seed: int = 0) -> Truth:
    """Triplets of one or two negatives; any member but one of a record may be a vector."""
    rng = np.random.default_rng(seed)
    members: list[list[NDArray[Any]]] = []
    for i in range(COUNT):
        kinds = ["image", "vector", "image"] + [["vector", "image"][i % 2]] * (i % 3 == 0)
        kinds = kinds if i % 4 else [kinds[1], kinds[0], *kinds[2:]]
        members.append(
            [
                rng.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
                if kind == "image"
                else rng.standard_normal(DIM).astype(np.float32)
                for kind in kinds
            ]
        )
    return Truth(members, rng.standard_normal((COUNT, TARGET_DIM)).astype(np.float32))


def encode(member: NDArray[Any]) -> tuple[str, bytes]:
    if member.ndim == 1:
        return "npy", save(member.astype(np.float64))
    file = io.BytesIO()
    Image.fromarray(member).save(file, "PNG")
    return "png", file.getvalue()


def write_files(folder: Path, truth: Truth) -> Path:
    """A CSV of paths, to images and to `.npy` files."""
    rows = ["anchor,positive,negative0,negative1,group,target"]
    for i, members in enumerate(truth.members):
        names = []
        for number, (suffix, data) in enumerate(map(encode, members)):
            names.append(f"{i}-{number}.{suffix}")
            (folder / names[-1]).write_bytes(data)
        np.save(folder / f"{i}-target.npy", truth.targets[i])
        rows.append(",".join([*names, *[""] * (4 - len(names)), f"g{i}", f"{i}-target.npy"]))
    (folder / "t.csv").write_text("\n".join(rows) + "\n")
    return folder / "t.csv"


def write_tars(folder: Path, truth: Truth) -> Path:
    """As other people write them."""
    folder.mkdir()
    with wds.ShardWriter(str(folder / "s-%02d.tar"), maxcount=9, verbose=0) as writer:
        for i, members in enumerate(truth.members):
            names = ["anchor", "positive", *(["negative"] if len(members) == 3 else ["negative0", "negative1"])]
            sample: dict[str, Any] = {"__key__": f"r{i}", "json": {"group": f"g{i}"}, "target.npy": truth.targets[i]}
            for name, (suffix, data) in zip(names, map(encode, members), strict=True):
                sample[f"{name}.{suffix}"] = data
            writer.write(sample)
    return folder


@pytest.fixture(scope="module")
def truth() -> Truth:
    return make_truth()


@pytest.fixture(scope="module")
def packed(truth: Truth, tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    folder = tmp_path_factory.mktemp("vectors")
    pack(write_files(folder, truth), folder / "shards", kind="triplet", max_shard_records=8, run_rows=3)
    return Manifest.open(folder / "shards")


def assert_true(batches: Iterable[Batch], truth: Truth) -> list[int]:
    """Every row of every valid record holds what was packed; the records' numbers."""
    seen = []
    for batch in batches:
        place = torch.arange(batch.num_rows) if batch.place is None else batch.place
        k = len(batch.images)
        assert batch.target is not None
        assert len(batch.draws) == k
        for record in range(batch.num_records):
            rows = torch.nonzero(batch.record == record).flatten().tolist()
            if not batch.valid[rows].all():
                assert not batch.valid[rows].any()
                continue
            seen.append(truth.groups[int(batch.group[rows[0]])])
            members = truth.members[seen[-1]]
            assert batch.view[rows].tolist() == list(range(len(members)))
            for row, member in zip(rows, members, strict=True):
                at = int(place[row])
                if member.ndim == 1:
                    assert batch.vectors is not None
                    found = batch.vectors[at - k].numpy()
                else:
                    found = batch.images[at].permute(1, 2, 0).numpy()
                np.testing.assert_array_equal(found, member)
                np.testing.assert_array_equal(batch.target[row].numpy(), truth.targets[seen[-1]])
    return seen


@pytest.mark.parametrize(("world", "threads"), [(1, 1), (1, 3), (2, 1), (3, 2)])
def test_batches_hold_what_was_packed_for_any_world_and_threads(
    packed: Manifest, truth: Truth, world: int, threads: int
) -> None:
    data = settings(image_size=SIDE, augment=PLAIN, batch=11, threads=threads)
    steps = [take(packed, data, 4, rank=rank, world=world) for rank in range(world)]
    seen = [number for batches in zip(*steps, strict=True) for number in assert_true(batches, truth)]
    assert sorted(seen[:COUNT]) == sorted(seen[COUNT:]) == list(range(COUNT)), "each record once an epoch"
    assert seen[:COUNT] == assert_true(take(packed, data, 2), truth), "the order knows no world"


def test_images_are_augmented_as_if_there_were_no_vectors(packed: Manifest) -> None:
    data = settings(image_size=SIDE, batch=11)
    whole = take(packed, data, 2)
    halves = [take(packed, data, 2, rank=rank, world=2) for rank in range(2)]
    for step, batch in enumerate(whole):
        assert torch.equal(batch.draws, torch.cat([half[step].draws for half in halves]))
        assert torch.equal(batch.images, torch.cat([half[step].images for half in halves]))
    assert len(torch.unique(torch.cat([batch.draws for batch in whole]), dim=0)) == sum(len(batch.draws) for batch in whole)


@pytest.mark.parametrize("world", [1, 3])
def test_evaluation_passes_over_every_record_once_and_pads(packed: Manifest, truth: Truth, world: int) -> None:
    data = settings(image_size=SIDE)
    seen, sizes = [], []
    for rank in range(world):
        batches = list(evaluation_batches(packed, data, rank=rank, world=world, batch=5))
        seen += assert_true(batches, truth)
        sizes.append(len(batches))
    assert sorted(seen) == list(range(COUNT))
    assert len(set(sizes)) == 1


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
    pack(path, tmp_path / "again", kind="triplet")
    assert Manifest.open(tmp_path / "again").digest == manifest.digest


def test_labelled_rows_have_targets_in_balanced_batches(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    targets = rng.standard_normal((24, 4)).astype(np.float32)
    images = rng.integers(0, 256, (24, SIDE, SIDE, 3), dtype=np.uint8)
    for i, image in enumerate(images):
        Image.fromarray(image).save(tmp_path / f"{i}.png")
    lists = pa.array(list(targets), pa.list_(pa.float32()))
    names = [f"{i}.png" for i in range(24)]
    table = pa.table({"image": names, "label": [f"c{i % 6}" for i in range(24)], "target": lists})
    pyarrow.parquet.write_table(table, tmp_path / "t.parquet")
    pack(tmp_path / "t.parquet", tmp_path / "out")
    manifest = Manifest.open(tmp_path / "out")
    assert (manifest.vector_dim, manifest.target_dim, manifest.num_images) == (0, 4, 24)
    by_image = {image.tobytes(): target for image, target in zip(images, targets, strict=True)}
    for batch in take(manifest, settings(image_size=SIDE, augment=PLAIN, batch=12, per_class=3, tail="pad"), 6):
        assert batch.place is batch.vectors is None
        assert batch.view.tolist() == [0, 1, 1] * 4
        assert batch.record.tolist() == list(range(12))
        assert batch.target is not None
        for image, target, valid in zip(batch.images.permute(0, 2, 3, 1), batch.target, batch.valid.tolist(), strict=True):
            if valid:
                np.testing.assert_array_equal(target.numpy(), by_image[image.numpy().tobytes()])


@pytest.mark.parametrize("which", ["vector", "target"])
def test_a_damaged_vector_masks_its_record_and_is_told(truth: Truth, tmp_path: Path, which: str) -> None:
    pack(write_files(tmp_path, truth), tmp_path / "out", kind="triplet")
    manifest = Manifest.open(tmp_path / "out")
    table = manifest.table(0)
    wanted = (table.view == -1) if which == "target" else (table.dim > 0) & (table.view >= 0)
    member = int(np.flatnonzero(wanted)[3])
    row = int(np.searchsorted(table.start, member, side="right")) - 1
    with manifest.shard_path(0).open("r+b") as file:
        file.seek(int(table.offset[member] + table.size[member]) - 1)
        last = file.read(1)[0]
        file.seek(-1, 1)
        file.write(bytes([last ^ 1]))
    reports: list[dict[str, Any]] = []
    data = settings(image_size=SIDE, augment=PLAIN, batch=11)
    batches = take(manifest, data, 2, on_bad=reports.append)
    lost = truth.groups[int(table.group[table.start[row]])]
    assert sorted(assert_true(batches, truth)) == sorted({*range(COUNT)} - {lost})
    assert [(one["key"], one["offset"]) for one in reports] == [(manifest.keys(0)[row], int(table.offset[member]))]
    assert sum(int((~batch.valid).sum()) for batch in batches) == len(truth.members[lost])
    assert [fault.offset for fault in verify(tmp_path / "out").faults if fault.key] == [int(table.offset[member])]


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
        ({"positive": [[], [1.0]]}, "column positive, row 0: expected a list of at least one"),
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


def test_inspect_counts_them_and_the_sheet_shows_them(packed: Manifest, truth: Truth, tmp_path: Path) -> None:
    num_vectors = sum(member.ndim == 1 for members in truth.members for member in members)
    num_images = sum(map(len, truth.members)) - num_vectors
    found = inspect(packed)
    assert (found.images, found.vectors, found.vector_dim) == (num_images, num_vectors, DIM)
    assert (found.targets, found.target_dim, packed.num_images) == (COUNT, TARGET_DIM, num_images)
    twos = sum(len(members) == 4 for members in truth.members)
    assert found.negatives == {"1": COUNT - twos, "2": twos}
    assert draw_sheet(packed, tmp_path / "sheet.png") == 12
    assert not verify(packed.path).faults


def test_a_manifest_with_another_length_is_noticed(truth: Truth, tmp_path: Path) -> None:
    pack(write_files(tmp_path, truth), tmp_path / "out", kind="triplet")
    file = tmp_path / "out" / "manifest.json"
    file.write_text(file.read_text().replace(f'"vector_dim": {DIM}', f'"vector_dim": {DIM + 1}'))
    assert [fault.reason for fault in verify(tmp_path / "out").faults] == [
        f"vector_dim is {DIM + 1}, but the tables have {DIM}"
    ]


def test_sources_of_other_lengths_are_not_mixed(packed: Manifest, truth: Truth, tmp_path: Path) -> None:
    shorter = Truth(
        [[m[:3] if m.ndim == 1 else m for m in members] for members in make_truth(1).members], make_truth(1).targets
    )
    pack(write_files(tmp_path, shorter), tmp_path / "out", kind="triplet")
    sources = [Source(path="a"), Source(path="b")]
    with pytest.raises(ValueError, match=r"vectors of one length, but these have: .* 5, .* 3"):
        Mixture([packed, Manifest.open(tmp_path / "out")], sources)
    both = Mixture([packed, packed], sources)
    assert (both.vector_dim, both.target_dim) == (DIM, TARGET_DIM)
    batch = take(both, settings(image_size=SIDE, batch=6), 1)[0]
    assert batch.vectors is not None
    assert batch.target is not None
