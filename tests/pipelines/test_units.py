"""K rows of one class at a time."""

from __future__ import annotations

import numpy as np
import pytest

from pipelines.manifest import Runs
from pipelines.units import Units

# shard, first row, length
RUNS = np.asarray([(0, 0, 5), (0, 5, 2), (0, 7, 1), (2, 0, 4), (2, 4, 7)])


def make(tail: str, per_class: int = 2, seed: int = 3) -> Units:
    return Units(Runs(*(RUNS[:, i].copy() for i in range(3))), 3, per_class=per_class, tail=tail, seed=seed)


def one_epoch(units: Units, epoch: int) -> list[tuple[int, list[int], list[bool]]]:
    found = []
    for shard, size in enumerate(units.sizes.tolist()):
        count = np.arange(size)
        rows, valid = units.rows(np.full(size, epoch), np.full(size, shard), count)
        found += [(shard, r, v) for r, v in zip(rows.tolist(), valid.tolist(), strict=True)]
    return found


@pytest.mark.parametrize("per_class", [2, 3, 4])
def test_padded_units_hold_every_row_once_and_one_class_each(per_class: int) -> None:
    units = make("pad", per_class)
    assert units.sizes.tolist() == [sum(-(-n // per_class) for s, _, n in RUNS.tolist() if s == shard) for shard in range(3)]
    for epoch in range(4):
        seen = []
        for shard, rows, valid in one_epoch(units, epoch):
            run = {np.flatnonzero((RUNS[:, 0] == shard) & (RUNS[:, 1] <= row))[-1] for row in rows}
            assert len(run) == 1
            assert valid[0]
            assert set(rows) == {row for row, ok in zip(rows, valid, strict=True) if ok}  # duplicates are of the unit itself
            seen += [(shard, row) for row, ok in zip(rows, valid, strict=True) if ok]
        assert sorted(seen) == [(shard, start + i) for shard, start, length in RUNS.tolist() for i in range(length)]


def test_dropping_leaves_other_rows_out_in_other_epochs() -> None:
    units = make("drop")
    assert units.sizes.tolist() == [3, 0, 5]
    left_out = set()
    for epoch in range(20):
        found = one_epoch(units, epoch)
        assert all(all(valid) for _, _, valid in found)
        used = {(shard, row) for shard, rows, _ in found for row in rows}
        assert len(used) == 16
        left_out |= {row for row in range(5) if (0, row) not in used}
    assert left_out == set(range(5))


def test_runs_are_cut_anew_every_epoch() -> None:
    units = make("pad")
    assert one_epoch(units, 0) != one_epoch(units, 1)
    assert one_epoch(units, 1) == one_epoch(make("pad"), 1)
    assert one_epoch(units, 1) != one_epoch(make("pad", seed=4), 1)


def test_later_shards_do_not_change_the_units_of_earlier_ones() -> None:
    few = Units(Runs(*(RUNS[:3, i].copy() for i in range(3))), 1, per_class=2, tail="pad", seed=3)
    assert few.sizes.tolist() == make("pad").sizes.tolist()[:1]
    for epoch in range(3):
        assert one_epoch(few, epoch) == [found for found in one_epoch(make("pad"), epoch) if found[0] == 0]


def test_a_unit_does_not_depend_on_what_is_asked_with_it() -> None:
    units = make("pad")
    together, _ = units.rows(np.asarray([1, 1, 2]), np.asarray([0, 2, 2]), np.asarray([0, 4, 1]))
    alone, _ = units.rows(np.asarray([2]), np.asarray([2]), np.asarray([1]))
    assert together[2].tolist() == alone[0].tolist()
