"""Several sources as one data set: what it shows of them, and that each of them keeps its own order."""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipelines.growth import begin
from pipelines.manifest import Manifest
from pipelines.mixed_order import MixedOrder
from pipelines.mixture import Mixture, class_shares, open_sources
from pipelines.stream import units_per_epoch
from tests.pipelines.streams import assert_equal, joined, settings, take, write_manifest


def mix(parts: list[Manifest], *sources: dict[str, Any]) -> Mixture:
    listed = [{"path": str(part.path), **source} for part, source in zip(parts, sources, strict=True)]
    mixed = open_sources(settings(train=listed).train)
    assert isinstance(mixed, Mixture)
    return mixed


@pytest.fixture
def mixed(many_shards: Manifest, labelled: Manifest) -> Mixture:
    """The same images twice, in many shards and in one; the classes of one are not those of the other."""
    return mix([many_shards, labelled], {"weight": 3}, {"weight": 1})


def test_one_source_is_that_data_set(labelled: Manifest) -> None:
    alone = open_sources(settings(train=str(labelled.path)).train)
    assert type(alone) is Manifest
    assert alone.digest == labelled.digest
    assert (alone.table(0).group == labelled.table(0).group).all()


def test_shards_are_numbered_on_and_read_from_where_they_lie(mixed: Mixture, many_shards: Manifest, labelled: Manifest) -> None:
    first = len(many_shards.sizes)
    assert mixed.sizes.tolist() == [*many_shards.sizes, *labelled.sizes]
    assert (mixed.num_samples, mixed.num_images, mixed.kind) == (112, 112, "labelled")
    assert mixed.keys(first) == labelled.keys(0)
    assert mixed.sources(2) == many_shards.sources(2)
    for shard in range(len(mixed.sizes)):
        data, table = mixed.shard_path(shard).read_bytes(), mixed.table(shard)
        for offset, size, crc32 in zip(table.offset, table.size, table.crc32, strict=True):
            assert zlib.crc32(data[offset : offset + size]) == crc32
    runs = mixed.runs
    at = runs.shard >= first
    assert (runs.shard[at] - first).tolist() == labelled.runs.shard.tolist()
    assert runs.length[~at].tolist() == many_shards.runs.length.tolist()


def test_an_image_in_two_sources_is_the_same_image_of_two_classes(mixed: Mixture, labelled: Manifest) -> None:
    tables = [mixed.table(shard) for shard in range(len(mixed.sizes))]
    uids, groups = (np.concatenate([getattr(table, name) for table in tables]) for name in ("uid", "group"))
    assert sorted(uids[:56]) == sorted(uids[56:])
    assert not set(groups[:56]) & set(groups[56:])
    assert len(set(groups)) == mixed.num_classes == 2 * labelled.num_classes
    for group in set(groups.tolist()):
        assert mixed.class_counts[group] == (groups == group).sum()
    assert sorted(mixed.class_names.values()) == sorted(2 * labelled.classes.names)


def test_sources_of_one_namespace_share_classes(many_shards: Manifest, labelled: Manifest) -> None:
    mixed = mix([many_shards, labelled, labelled], {"namespace": "a"}, {"namespace": "a"}, {})
    assert mixed.num_classes == 2 * labelled.num_classes
    counts = dict.fromkeys(labelled.classes.names, 0)
    for group, name in mixed.class_names.items():
        counts[name] += mixed.class_counts[group]
    assert counts == {n: 3 * c for n, c in zip(labelled.classes.names, labelled.classes.counts.tolist(), strict=True)}
    groups = {int(g): n for s in range(len(mixed.sizes) - 1) for g in mixed.table(s).group for n in [mixed.class_names[int(g)]]}
    assert len(groups) == labelled.num_classes


def test_class_shares_follow_the_weights(tmp_path: Path) -> None:
    one = write_manifest(tmp_path / "1", "labelled", [["a", "a", "b", "b"]])
    other = write_manifest(tmp_path / "2", "labelled", [["b", "c"]])
    mixed = mix([one, other], {"weight": 3, "namespace": "n"}, {"weight": 1, "namespace": "n"})
    shares = dict(zip(mixed.classes.names, class_shares(mixed).tolist(), strict=True))
    assert shares == pytest.approx({"a": 0.375, "b": 0.375 + 0.125, "c": 0.125})
    assert class_shares(other).tolist() == [0.5, 0.5]


@pytest.mark.parametrize("kind", ["pair", "labelled_pair", "triplet"])
def test_a_shared_namespace_does_not_join_records_that_have_no_group(kind: str, tmp_path: Path) -> None:
    parts = [write_manifest(tmp_path / str(i), kind, [["same", None, None]]) for i in range(2)]  # the keys are the same
    for part in parts:
        assert (part.table(0).group == parts[0].table(0).group).all()
    mixed = mix(parts, {"namespace": "n"}, {"namespace": "n"})
    left, right = mixed.table(0), mixed.table(1)
    common = set(left.group.tolist()) & set(right.group.tolist())
    assert common == {int(left.group[0])} == {int(right.group[0])}
    assert len(set(left.group.tolist())) == len(set(parts[0].table(0).group.tolist()))


def test_kinds_are_not_mixed(labelled: Manifest, triplets: Manifest) -> None:
    with pytest.raises(ValueError, match=r"one kind.*labelled'? ?.*triplet"):
        mix([labelled, triplets], {}, {})


def own_orders(manifest: Manifest, positions: int) -> list[list[tuple[int, int, int]]]:
    """(epoch, shard, row) of each source's own order, as far as the mixture's first positions go, one after the other."""
    order = MixedOrder(manifest, settings(), seed=5, histories=begin(manifest))
    firsts = manifest.first_shards if isinstance(manifest, Mixture) else np.asarray([0, len(manifest.sizes)])
    found: list[list[tuple[int, int, int]]] = [[] for _ in firsts[1:]]
    for position in range(positions):
        slots = order.slice(position, 1)
        source = int(np.searchsorted(firsts, slots.shard[0], side="right")) - 1
        found[source].append((int(slots.epoch[0]), int(slots.shard[0] - firsts[source]), int(slots.rows[0, 0])))
    return found


def test_the_order_of_a_source_does_not_depend_on_the_others(many_shards: Manifest, labelled: Manifest, tmp_path: Path) -> None:
    other = write_manifest(tmp_path / "o", "labelled", [["a"] * 9, ["b"] * 11])
    _, reference = own_orders(mix([many_shards, labelled], {}, {}), 300)
    _, found, _ = own_orders(mix([other, labelled, many_shards], {"weight": 0.2}, {"weight": 0.5}, {"weight": 0.3}), 300)
    assert found == reference[: len(found)]
    assert len(found) == 150
    (alone,) = own_orders(many_shards, 200)
    first, second = own_orders(mix([many_shards, many_shards], {}, {}), 300)
    assert first == alone[:150]
    assert second != first  # the same data twice comes in two orders


@pytest.mark.parametrize("options", [{}, {"per_class": 2}])
def test_threads_ranks_and_restarts_change_nothing(mixed: Mixture, options: dict[str, Any]) -> None:
    data = settings(threads=1, prefetch=1, **options)
    one = take(mixed, data, 30)
    for batch, other in zip(one, take(mixed, settings(threads=3, prefetch=5, **options), 30), strict=True):
        assert_equal(batch, other)
    ranks = [take(mixed, data, 30, rank=rank, world=3) for rank in range(3)]
    for batch, parts in zip(one, zip(*ranks, strict=True), strict=True):
        assert_equal(batch, joined(parts))
    position = 13 * 8 // options.get("per_class", 1)
    for batch, other in zip(one[13:], take(mixed, data, 17, position=position), strict=True):
        assert_equal(batch, other)
    shares = [int((batch.sample[:, 1] < len(mixed.sizes) - 1).sum()) for batch in one]
    assert set(shares) == {6}  # three quarters of 8, in every batch


def test_an_image_is_not_changed_alike_in_two_sources(many_shards: Manifest) -> None:
    batches = take(mix([many_shards, many_shards], {}, {}), settings(batch=40), 2)
    draws: dict[int, list[torch.Tensor]] = {}
    for batch in batches:
        for uid, epoch, drawn in zip(batch.uid.tolist(), batch.sample[:, 0].tolist(), batch.draws, strict=True):
            if epoch == 0:
                draws.setdefault(uid, []).append(drawn)
    twice = [pair for pair in draws.values() if len(pair) == 2]
    assert len(twice) > 10
    assert not any(torch.equal(*pair) for pair in twice)


def test_an_epoch_of_a_mixture_is_as_long_as_all_sources_together(mixed: Mixture, labelled: Manifest) -> None:
    assert units_per_epoch(mixed, settings()) == 112
    both = sum(units_per_epoch(part, settings(per_class=4)) for part in mixed.parts)
    assert units_per_epoch(mixed, settings(per_class=4)) == both
    with pytest.raises(ValueError, match="takes up to 60 from one source, more than the 56 records"):
        units_per_epoch(mixed, settings(batch=80))
