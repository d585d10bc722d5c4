"""Data that grows during a run: new shards come in at the next epoch's border, and every resume gives the same stream."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipelines.growth import History, begin, follow, unit_sizes, verify
from pipelines.manifest import Manifest
from pipelines.mixed_order import MixedOrder
from pipelines.mixture import Mixture
from pipelines.order import Order
from tests.pipelines.streams import assert_equal, settings, take, write_manifest, write_union

SHARDS = [["a"] * 7 + ["b"] * 4, ["c"] * 9, ["a"] * 5, ["d"] * 3 + ["b"] * 8, ["e"] * 6]


def grown(tmp_path: Path, num_shards: int) -> Manifest:
    return write_manifest(tmp_path / str(num_shards), "labelled", SHARDS[:num_shards])


def stream(manifest: Manifest, histories: tuple[History, ...], options: dict[str, Any], first: int, last: int) -> list[Any]:
    """Every position by itself: (epoch, shard, rows)."""
    order = MixedOrder(manifest, settings(**options), seed=5, histories=histories)
    slots = [order.slice(position, 1) for position in range(first, last)]
    return [(int(s.epoch[0]), int(s.shard[0]), s.rows[0].tolist()) for s in slots]


@pytest.mark.parametrize("options", [{}, {"per_class": 2}, {"per_class": 3, "tail": "drop"}])
def test_a_run_that_was_resumed_over_growing_data_twice_reads_whole_epochs_of_each(
    options: dict[str, Any], tmp_path: Path
) -> None:
    data = settings(**options)
    sets = [grown(tmp_path, m) for m in (2, 3, 5)]
    units = [int(unit_sizes(part, data).sum()) for part in sets]
    stops = [units[0] + 3, 2 * units[0] + units[1] // 2]  # in epoch 1 and, after the border, in epoch 2
    histories = begin(sets[0])
    read = stream(sets[0], histories, options, 0, stops[0])
    for part, place, until in ((sets[1], stops[0], stops[1]), (sets[2], stops[1], 2 * units[0] + units[1] + 2 * units[2])):
        histories = follow(histories, part, data, place, accept=True)
        read += stream(part, histories, options, place, until)
    assert [epoch for epoch, _, _ in read] == sorted(epoch for epoch, _, _ in read)
    for epoch, part in enumerate([sets[0], sets[0], sets[1], sets[2], sets[2]]):
        seen = [(shard, tuple(rows)) for e, shard, rows in read if e == epoch]
        assert len(set(seen)) == len(seen) == int(unit_sizes(part, data).sum())
        assert {shard for shard, _ in seen} == set(range(len(part.sizes)))
    # Later resumes, also where the data has grown further, give what was read.
    saved = tuple(History.from_dict(history.as_dict()) for history in histories)
    assert stream(sets[2], saved, options, 0, len(read)) == read
    order = Order(unit_sizes(sets[2], data), seed=5, lanes=data.lanes, window=data.window)
    epoch, shard, _ = order.slice(3 * units[2], 1)
    assert read[2 * units[0] + units[1]][:2] == (int(epoch[0]), int(shard[0]))


def test_growth_in_the_middle_of_a_wait_for_the_border_takes_all_at_that_border(tmp_path: Path) -> None:
    data = settings()
    sets = [grown(tmp_path, m) for m in (2, 3, 4)]
    histories = begin(sets[0])
    histories = follow(histories, sets[1], data, 25, accept=True)
    assert [(s.first, s.first_epoch, s.num_shards) for s in histories[0].stages] == [(0, 0, 2), (40, 2, 3)]
    histories = follow(histories, sets[2], data, 31, accept=True)
    assert [(s.first, s.first_epoch, s.num_shards) for s in histories[0].stages] == [(0, 0, 2), (40, 2, 4)]
    assert follow(histories, sets[2], data, 33, accept=True) == histories
    at_border = follow(begin(sets[0]), sets[1], data, 40, accept=True)
    assert [(s.first, s.first_epoch) for s in at_border[0].stages] == [(0, 0), (40, 2)]
    at_once = follow(begin(sets[0]), sets[1], data, 0, accept=True)
    assert [(s.first, s.num_shards) for s in at_once[0].stages] == [(0, 3)]


def test_the_batches_of_grown_data_are_the_same_for_any_batch_and_world(tmp_path: Path) -> None:
    small, large = grown(tmp_path, 2), grown(tmp_path, 5)
    histories = follow(begin(small), large, settings(), 25, accept=True)
    alone = stream(large, histories, {}, 0, 150)
    order = MixedOrder(large, settings(), seed=5, histories=histories)
    rng = np.random.default_rng(3)
    position, seen = 0, []
    while position < 150:
        batch = min(int(rng.integers(1, 50)), 150 - position)
        world = min(batch, int(rng.integers(1, 6)))
        parts = [order.slice(position, batch, rank, world) for rank in range(world)]
        mine = [row for s in parts for row in zip(s.epoch.tolist(), s.shard.tolist(), s.rows.tolist(), strict=True)]
        assert sorted(mine) == sorted(alone[position : position + batch])
        seen += mine
        position += batch
    assert sorted(seen) == sorted(alone)


def test_a_source_that_grows_changes_nothing_of_the_others(many_shards: Manifest, labelled: Manifest, tmp_path: Path) -> None:
    """With images: draws and pixels too, though the others' shards have other numbers now."""
    sources = settings(train=[{"path": "x"}, {"path": "x"}]).train
    small = Mixture([labelled, many_shards], sources)
    large = Mixture([write_union(tmp_path / "u", [labelled, many_shards]), many_shards], sources)
    histories = follow(begin(small), large, settings(), 80, accept=True)
    assert [len(history.stages) for history in histories] == [2, 1]
    before = take(small, settings(), 14)
    after = take(large, settings(), 42, histories=histories)
    added = len(many_shards.sizes)
    for one, other in zip(before, after, strict=False):  # 14 batches of 8: up to the border of the first source, at 56
        other.sample[other.sample[:, 1] > 0, 1] -= added
        assert_equal(one, other)
    assert {shard for batch in after[14:] for shard in batch.sample[:, 1].tolist()} == set(range(len(large.sizes)))


def test_other_data_is_refused_and_grown_data_only_with_leave(tmp_path: Path) -> None:
    small, large = grown(tmp_path, 2), grown(tmp_path, 3)
    with pytest.raises(ValueError, match=r"grown from 2 to 3 shards .*--resume --accept-new-data"):
        follow(begin(small), large, settings(), 5, accept=False)
    changed = write_manifest(tmp_path / "changed", "labelled", [SHARDS[0], ["x"] * 9, SHARDS[2]])
    shorter = grown(tmp_path, 1)
    for other in (changed, shorter):
        with pytest.raises(ValueError, match=r"other data than the run was started with \(digest"):
            follow(begin(small), other, settings(), 5, accept=True)
    two = Mixture([small, small], settings(train=["x", "x"]).train)
    with pytest.raises(ValueError, match="1 sources before, 2 now"):
        follow(begin(small), two, settings(), 5, accept=True)
    verify(begin(small), large)  # a worker that is started again sees more shards: it reads the first two
    with pytest.raises(RuntimeError, match="other shards here"):
        verify(begin(small), changed)
