"""Batches in pieces that no two ranks share."""

from __future__ import annotations

from typing import Any

import pytest

from pipelines.manifest import Manifest
from pipelines.stream import evaluation_batches
from tests.pipelines.streams import assert_equal, joined, settings, take


@pytest.mark.parametrize(("piece", "options"), [(3, {"batch": 8}), (4, {"per_class": 2, "batch": 10}), (8, {"batch": 8})])
def test_ranks_get_whole_pieces_that_make_up_the_same_batch(many_shards: Manifest, piece: int, options: dict[str, Any]) -> None:
    data = settings(**options)
    one, num_pieces = take(many_shards, data, 5), -(-data.batch // piece)
    for world in range(1, num_pieces + 1):
        ranks = [take(many_shards, data, 5, rank=rank, world=world, piece=piece) for rank in range(world)]
        for batch, parts in zip(one, zip(*ranks, strict=True), strict=True):
            assert_equal(batch, joined(parts))
            assert all(part.num_records % piece == 0 for part in parts[:-1])
            assert all(part.num_records > 0 for part in parts)
    with pytest.raises(ValueError, match=f"{num_pieces} pieces of {piece}"):
        take(many_shards, data, 1, rank=0, world=num_pieces + 1, piece=piece)


def test_fixed_evaluation_batches_hold_the_same_images_for_any_number_of_ranks(many_shards: Manifest) -> None:
    size, total = 16, many_shards.num_samples
    expected = list(evaluation_batches(many_shards, settings(), batch=size, fixed=True))
    assert len(expected) == -(-total // size)
    for world in (2, 3):
        every = [evaluation_batches(many_shards, settings(), rank=r, world=world, batch=size, fixed=True) for r in range(world)]
        found = [part for parts in zip(*every, strict=True) for part in parts]
        for batch, same in zip(expected, found, strict=False):
            assert_equal(batch, same)
        assert not any(rest.valid.any() for rest in found[len(expected) :])
