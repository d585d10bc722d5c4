"""What cannot be read keeps its place, is told of, and stops a run when it is too much."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from configs.schema import Augment
from pipelines.fill import Filler
from pipelines.manifest import Manifest
from pipelines.pack import pack
from pipelines.read import Reader
from pipelines.stream import Loader, evaluation_batches
from tests.pipelines.streams import settings, take

Painter = Callable[..., Image.Image]


@pytest.fixture
def damaged(tmp_path: Path, folder: Path) -> tuple[Manifest, set[str]]:
    """A data set with two images whose bytes changed after packing; returns their keys."""
    pack(folder, tmp_path / "damaged")
    manifest = Manifest.open(tmp_path / "damaged")
    table, path = manifest.table(0), manifest.shard_path(0)
    data = bytearray(path.read_bytes())
    for row in (3, 17):
        data[table.offset[row] + table.size[row] // 2] ^= 1
    path.write_bytes(data)
    return manifest, {manifest.keys(0)[row] for row in (3, 17)}


def test_bad_images_keep_their_place_and_are_reported_once(
    damaged: tuple[Manifest, set[str]], labelled: Manifest, caplog: pytest.LogCaptureFixture
) -> None:
    manifest, keys = damaged
    reports: list[dict[str, Any]] = []
    data = settings(batch=56)
    caplog.set_level(logging.WARNING)
    with Loader(manifest, data, seed=5, on_bad=reports.append) as loader:
        batches = [next(loader) for _ in range(3)]
        assert (loader.images, loader.bad) == (3 * 56, 6)
    assert {report["key"] for report in reports} == keys
    assert len(reports) == 2
    assert all("CRC32" in report["reason"] and report["source"] and report["shard"] == "000000.tar" for report in reports)
    assert len(caplog.records) == 2
    for batch in batches:
        bad = [row for (_, _, row), valid in zip(batch.sample.tolist(), batch.valid, strict=True) if not valid]
        assert sorted(bad) == [3, 17]
        assert (batch.images[~batch.valid] == 0).all()


def test_too_many_bad_images_stop_the_run(damaged: tuple[Manifest, set[str]]) -> None:
    manifest, _ = damaged
    with Loader(manifest, settings(batch=56, max_bad_fraction=0.01), seed=5) as loader:
        next(loader)  # fewer than 1 / 0.01 images: too early to tell
        with pytest.raises(RuntimeError, match=r"4 of 112 images could not be read.*max_bad_fraction = 0.01.*CRC32"):
            next(loader)
    with pytest.raises(RuntimeError, match="2 of 56"):
        take(manifest, settings(batch=56, max_bad_fraction=0.0), 1)
    with pytest.raises(RuntimeError, match="2 of 56"):
        list(evaluation_batches(manifest, settings(max_bad_fraction=0.02), batch=56))


def test_one_bad_image_invalidates_its_triplet(triplets: Manifest) -> None:
    table, path = triplets.table(0), triplets.shard_path(0)
    data = bytearray(path.read_bytes())
    data[int(table.offset[table.start[4] + 1]) + 30] ^= 255
    path.write_bytes(data)
    (batch,) = take(triplets, settings(batch=12), 1)
    for record, (_, _, row) in enumerate(batch.sample.tolist()):
        assert (batch.valid[batch.record == record] == (row != 4)).all()


def test_a_cut_shard_spoils_only_what_was_cut(tmp_path: Path, folder: Path) -> None:
    pack(folder, tmp_path / "cut")
    manifest = Manifest.open(tmp_path / "cut")
    path, table = manifest.shard_path(0), manifest.table(0)
    path.write_bytes(path.read_bytes()[: int(table.offset[50]) + 10])
    (batch,) = take(manifest, settings(batch=56), 1)
    rows = batch.sample[:, 2]
    assert torch.equal(batch.valid, rows < 50)


def test_a_missing_shard_stops_the_run_with_its_name(tmp_path: Path, folder: Path) -> None:
    pack(folder, tmp_path / "gone")
    manifest = Manifest.open(tmp_path / "gone")
    manifest.shard_path(0).unlink()
    with Loader(manifest, settings(), seed=1) as loader:
        with pytest.raises(RuntimeError, match=r"cannot open the shard .*000000\.tar"):
            next(loader)
        with pytest.raises(RuntimeError, match="closed"):
            next(loader)


def test_an_error_in_a_thread_surfaces_and_later_batches_do_not_hang(labelled: Manifest) -> None:
    def explode() -> Any:
        raise ZeroDivisionError("in a thread")

    filler = Filler(labelled, settings(threads=3), Augment(), iter([explode, explode]))
    with pytest.raises(ZeroDivisionError, match="in a thread"):
        next(filler)


def test_changed_bytes_are_noticed_and_other_images_still_read(damaged: tuple[Manifest, set[str]]) -> None:
    manifest, _ = damaged
    table, reader = manifest.table(0), Reader(manifest)
    with pytest.raises(ValueError, match="CRC32"):
        reader.read(0, int(table.offset[3]), int(table.size[3]), int(table.crc32[3]))
    assert reader.read(0, int(table.offset[4]), int(table.size[4]), int(table.crc32[4]))
    with pytest.raises(ValueError, match="ends early"):
        reader.read(0, 10**9, 5, 0)
    reader.close()
