"""Vectors in place of images, and targets of records: in batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
from PIL import Image

from configs.schema import Source
from pipelines.inspect import inspect
from pipelines.manifest import Manifest
from pipelines.mixture import Mixture
from pipelines.pack import pack
from pipelines.sheet import draw_sheet
from pipelines.stream import evaluation_batches
from pipelines.verify import verify
from tests.pipelines.streams import settings, take
from tests.pipelines.vectors import (
    COUNT,
    DIM,
    PLAIN,
    SIDE,
    TARGET_DIM,
    Truth,
    assert_true,
    make_truth,
    write_files,
)


@pytest.fixture(scope="module")
def truth() -> Truth:
    return make_truth()


@pytest.fixture(scope="module")
def packed(truth: Truth, tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    folder = tmp_path_factory.mktemp("vectors")
    pack(write_files(folder, truth), folder / "shards", kind="triplet", max_shard_records=8, run_rows=3)
    return Manifest.open(folder / "shards")


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
