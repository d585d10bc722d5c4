"""The loader gives the same samples whatever the threads, the ranks and the moment it starts at."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from configs.schema import Augment
from pipelines.decode import decode
from pipelines.fill import single_core_threads
from pipelines.geometry import place, whole
from pipelines.hashing import hash_bytes
from pipelines.manifest import Manifest
from pipelines.pack import pack
from pipelines.stream import Loader, evaluation_batches, units_per_epoch
from tests.pipelines.streams import assert_equal, joined, samples, settings, take

Painter = Callable[..., Image.Image]


@pytest.mark.parametrize("options", [{}, {"per_class": 2}, {"per_class": 4, "tail": "drop"}])
def test_threads_and_ranks_change_nothing(many_shards: Manifest, options: dict[str, Any]) -> None:
    one = take(many_shards, settings(threads=1, prefetch=1, **options), 9)
    for batch, other in zip(one, take(many_shards, settings(threads=3, prefetch=5, **options), 9), strict=True):
        assert_equal(batch, other)
    for world in (2, 3) if options.get("per_class") != 4 else (2,):
        ranks = [take(many_shards, settings(**options), 9, rank=rank, world=world) for rank in range(world)]
        for batch, parts in zip(one, zip(*ranks, strict=True), strict=True):
            assert_equal(batch, joined(parts))


def test_ragged_triplets_are_the_same_for_any_world(triplets: Manifest) -> None:
    data = settings(batch=5)
    one = take(triplets, data, 6)
    ranks = [take(triplets, data, 6, rank=rank, world=3) for rank in range(3)]
    for batch, parts in zip(one, zip(*ranks, strict=True), strict=True):
        assert_equal(batch, joined(parts))


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("per_class", [None, 2])
def test_a_run_can_go_on_from_any_position_on_any_number_of_ranks(
    many_shards: Manifest, per_class: int | None, world: int
) -> None:
    data = settings(per_class=per_class)
    with Loader(many_shards, data, seed=5) as loader:
        seen = [(loader.position, next(loader)) for _ in range(20)]
    for position, batch in seen[::6]:
        ranks = [take(many_shards, data, 1, position=position, rank=rank, world=world)[0] for rank in range(world)]
        assert_equal(batch, joined(ranks))
    assert [position for position, _ in seen] == [t * 8 // (per_class or 1) for t in range(20)]


def test_every_sample_comes_once_an_epoch_while_everything_changes(many_shards: Manifest) -> None:
    rng = np.random.default_rng(1)
    total, position, seen = many_shards.num_samples, 0, []
    while position < 2 * total:
        batch = min(int(rng.integers(2, 20)), 2 * total - position)
        if batch < 2:
            break
        world = int(rng.integers(1, min(4, batch + 1)))
        for rank in range(world):
            seen += samples(take(many_shards, settings(batch=batch), 1, position=position, rank=rank, world=world))
        position += batch
    assert len(set(seen)) == len(seen) == position
    assert {s for s in seen if s[0] == 0} == {(0, m, r) for m, size in enumerate(many_shards.sizes) for r in range(size)}


def test_balanced_batches_hold_k_images_of_a_class(many_shards: Manifest) -> None:
    for batch in take(many_shards, settings(batch=16, per_class=4), 10):
        assert batch.record.tolist() == list(range(16))
        assert batch.view.tolist() == [0, 1, 1, 1] * 4
        for unit in range(4):
            rows = slice(4 * unit, 4 * unit + 4)
            assert len(set(batch.group[rows].tolist())) == 1
            uids = batch.uid[rows][batch.valid[rows]].tolist()
            assert len(set(uids)) == len(uids) > 0


def test_records_bring_their_images_groups_and_weights(triplets: Manifest) -> None:
    table = triplets.table(0)
    (batch,) = take(triplets, settings(batch=12, augment=Augment()), 1)
    assert batch.weight is not None
    assert sorted(batch.weight.tolist()) == [1.0 + i for i in range(12)]
    for record, (_, shard, row) in enumerate(batch.sample.tolist()):
        rows = (batch.record == record).nonzero().flatten()
        expected = slice(int(table.start[row]), int(table.start[row + 1]))
        assert shard == 0
        assert batch.uid[rows].tolist() == table.uid[expected].tolist()
        assert batch.view[rows].tolist() == list(range(len(rows)))
        assert batch.group[rows[0]] == batch.group[rows[1]]
        assert len(set(batch.group[rows].tolist())) == len(rows) - 1
        data = triplets.shard_path(0).read_bytes()
        for index, at in zip(rows.tolist(), range(expected.start, expected.stop), strict=True):
            pixels = decode(data[table.offset[at] : table.offset[at] + table.size[at]])
            assert hash_bytes(data[table.offset[at] : table.offset[at] + table.size[at]]) == batch.uid[index]
            assert torch.equal(batch.images[index], place(pixels, whole(40, 32, 16, "crop"), 16))


def test_labelled_pairs_bring_their_match(tmp_path: Path, painter: Painter) -> None:
    (tmp_path / "im").mkdir()
    for i in range(8):
        painter(i).save(tmp_path / "im" / f"{i}.png")
    names = [f"im/{i}.png" for i in range(8)]
    rows = [f"{names[2 * i]},{names[2 * i + 1]},{i % 2}\n" for i in range(4)]
    (tmp_path / "t.csv").write_text("left,right,match\n" + "".join(rows))
    pack(tmp_path / "t.csv", tmp_path / "out", kind="labelled_pair")
    (batch,) = take(Manifest.open(tmp_path / "out"), settings(batch=4), 1)
    assert batch.match is not None
    assert sorted(batch.match.tolist()) == [0, 0, 1, 1]
    groups = batch.group.reshape(4, 2)
    assert (groups[:, 0] == groups[:, 1]).long().tolist() == batch.match.tolist()
    assert batch.view.tolist() == [0, 1] * 4


def test_memory_goes_round_but_never_while_somebody_looks_at_it(many_shards: Manifest) -> None:
    kept = take(many_shards, settings(prefetch=2), 12)
    places = set()
    with Loader(many_shards, settings(prefetch=2), seed=5) as loader:
        view = next(loader).images[1:, :, ::2]  # the batch itself is gone
        for expected in kept[1:]:
            batch = next(loader)
            assert torch.equal(batch.images, expected.images)
            places.add(batch.images.data_ptr())
        assert torch.equal(view, kept[0].images[1:, :, ::2])
    assert len(places) <= 5
    assert len({batch.images.data_ptr() for batch in kept}) == len(kept)


def test_draws_of_two_epochs_and_of_two_uses_differ(many_shards: Manifest) -> None:
    batches = take(many_shards, settings(batch=56), 2)
    first, second = ({int(u): d for u, d in zip(b.uid, b.draws, strict=True)} for b in batches)
    assert first.keys() == second.keys()
    assert all((first[uid] != second[uid]).any() for uid in first)
    assert not torch.equal(*(b.images[b.uid.argsort()] for b in batches))


def test_evaluation_shows_every_record_once_and_plain(many_shards: Manifest, folder: Path) -> None:
    data = settings(resize="pad")
    sources = [name for shard in range(len(many_shards.sizes)) for name in many_shards.sources(shard)]
    for world, batch in ((1, 10), (2, 7), (3, 16), (5, 100)):
        ranks = [list(evaluation_batches(many_shards, data, rank=rank, world=world, batch=batch)) for rank in range(world)]
        assert len({len(batches) for batches in ranks}) == 1
        assert len({part.images.shape for batches in ranks for part in batches}) == 1
        together = joined(part for parts in zip(*ranks, strict=True) for part in parts)
        valid = together.valid
        rows = [tuple(row) for row in together.sample[together.record[valid]].tolist()]
        assert rows == [(0, m, r) for m, size in enumerate(many_shards.sizes) for r in range(size)]
        assert (together.sample[together.record[~valid]] == torch.tensor([0, -1, -1])).all()
        for image, source in zip(together.images[valid], sources, strict=True):
            pixels = np.array(Image.open(folder / source))
            assert torch.equal(image, place(pixels, whole(40, 32, 16, "pad"), 16))


def test_decoding_threads_use_one_core_each_and_leave_the_others_alone() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        pool = single_core_threads(2)
        inside = [pool.submit(torch.get_num_threads) for _ in range(8)]
        assert [task.result() for task in inside] == [1] * 8
        assert torch.get_num_threads() == 3
        with ThreadPoolExecutor(1) as other:
            assert other.submit(torch.get_num_threads).result() == 3
        pool.shutdown()
    finally:
        torch.set_num_threads(before)


def test_waiting_is_measured_and_prefetch_is_not_counted(many_shards: Manifest) -> None:
    with Loader(many_shards, settings(prefetch=6), seed=1, position=16) as loader:
        next(loader)
        time.sleep(0.1)
        assert loader.position == 24
        assert loader.wait_s > 0.0
        waited = loader.wait_s
        next(loader)
        assert loader.wait_s - waited < 0.09


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch": 57}, r"data\.batch = 57 is more than the 56 records"),
        ({"batch": 30, "per_class": 15}, r"per_class 15 is more than the longest run"),
        ({"batch": 60, "per_class": 2}, r"= 30 is more than the 24 runs of 2"),
    ],
)
def test_batches_that_cannot_be_are_refused(labelled: Manifest, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        units_per_epoch(labelled, settings(**options, tail="drop"))


def test_per_class_is_refused_without_classes(triplets: Manifest) -> None:
    with pytest.raises(ValueError, match="of kind 'triplet'"):
        units_per_epoch(triplets, settings(per_class=2))
    with pytest.raises(ValueError, match="rank 3 of 3"):
        Loader(triplets, settings(), seed=1, rank=3, world=3)


def test_units_of_an_epoch_are_counted(labelled: Manifest) -> None:
    assert units_per_epoch(labelled, settings()) == 56
    runs = labelled.runs.length
    assert units_per_epoch(labelled, settings(per_class=4)) == int(np.ceil(runs / 4).sum())
    assert units_per_epoch(labelled, settings(per_class=4, tail="drop")) == int((runs // 4).sum())


@pytest.mark.parametrize("per_class", [None, 2])
def test_two_views_of_an_image_differ_and_are_one_record(many_shards: Manifest, per_class: int | None) -> None:
    data = settings(views=2, per_class=per_class)
    one, labelled = take(many_shards, data, 5), take(many_shards, settings(per_class=per_class), 5)
    for batch, single in zip(one, labelled, strict=True):
        assert batch.num_records == single.num_records == batch.num_rows // 2
        assert torch.equal(batch.sample, single.sample)
        assert batch.view.tolist() == [0, 1] * batch.num_records
        assert batch.record.tolist() == [i // 2 for i in range(batch.num_rows)]
        assert torch.equal(batch.uid[::2], single.uid)
        assert torch.equal(batch.uid[1::2], single.uid)
        first, second = batch.draws[::2], batch.draws[1::2]
        assert not (first == second).all(1).any()
        assert torch.equal(batch.group[::2], single.group if per_class else single.uid)
    for world in (2, 3):
        ranks = [take(many_shards, data, 5, rank=rank, world=world) for rank in range(world)]
        for batch, parts in zip(one, zip(*ranks, strict=True), strict=True):
            assert_equal(batch, joined(parts))


def test_two_views_are_for_labelled_images(triplets: Manifest) -> None:
    with pytest.raises(ValueError, match=r"data\.views: 2 is for labelled data"):
        take(triplets, settings(views=2), 1)
