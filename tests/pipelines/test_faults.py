"""Everything that can be wrong with a shard or its server: noticed, named, counted, and never a wrong pair."""

from __future__ import annotations

import io
import os
import re
import time
import zlib
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from configs.errors import Unrecoverable
from configs.schema import Data
from pipelines import read, remote, threads
from pipelines.batch import Batch
from pipelines.hashing import hash_bytes
from pipelines.manifest import Manifest
from pipelines.manifest_writer import ManifestWriter
from pipelines.prepare import PackedImage, prepare
from pipelines.records import LocalFile, Record
from pipelines.shards import ShardWriter
from pipelines.stream import Loader
from tests.pipelines.faults import CASES
from tests.pipelines.servers import serving
from tests.pipelines.streams import settings

PAIRS, PER_SHARD, BATCHES, BAD_SHARD = 24, 8, 4, 1
Painter = Callable[..., Image.Image]


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr(read, "PAUSES_S", (0.01, 0.01))
    monkeypatch.setattr(threads, "JOIN_S", 0.3)


@pytest.fixture(scope="module")
def pairs(painter: Painter) -> Callable[..., Manifest]:
    """Packs 24 pairs into three shards; `odd` gives images of the second shard that no packer would take."""
    images = []
    for number in range(2 * PAIRS):
        buffer = io.BytesIO()
        painter(number).save(buffer, "PNG")
        images.append(prepare(buffer.getvalue()))
    largest = 2 * max(-(-len(image.data) // 512) * 512 + 512 for image in images) + 1024

    def make(out: Path, odd: dict[int, bytes]) -> Manifest:
        manifest = ManifestWriter(out, "pair")
        with ShardWriter(out, "pair", manifest.add, max_bytes=PAIRS * largest, max_records=PER_SHARD) as writer:
            for number in range(PAIRS):
                both = [images[2 * number], images[2 * number + 1]]
                for view in (0, 1):
                    data = odd.get(2 * number + view - 2 * PER_SHARD)
                    if data is not None:
                        both[view] = PackedImage(data, "png", 40, 32, zlib.crc32(data), hash_bytes(data))
                names = tuple(LocalFile(Path(f"{number} {side}.png"), f"{number} {side}.png") for side in "ab")
                writer.write(number, Record(names), both)
        manifest.finish()
        return Manifest.open(out)

    return make


def options(cache: Path, **values: Any) -> Data:
    defaults = {"batch": PAIRS // BATCHES, "lanes": 2, "window": 8, "max_bad_shard_fraction": 1.0, "timeout_s": 20}
    return settings(**{**defaults, "cache": str(cache), "block_mb": 4 / 1024, **values})


def epoch_of(loader: Loader) -> list[Batch]:
    return [next(loader) for _ in range(BATCHES)]


def read_epoch(manifest: Manifest, data: Data, reports: list[dict[str, Any]]) -> list[list[Batch]]:
    """The batches of both ranks of two, and what they told; the counts agree with it."""
    ranks = []
    for rank in (0, 1):
        told: list[dict[str, Any]] = []
        with Loader(manifest, data, seed=5, rank=rank, world=2, on_bad=told.append) as loader:
            ranks.append(epoch_of(loader))
            assert (loader.bad, loader.images) == (len(told), 2 * PAIRS // 2)
        reports += told
    return ranks


@pytest.fixture(scope="module")
def clean(pairs: Callable[..., Manifest], tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, ...], Batch]:
    """Every pair as it should come: its sample to a batch of it alone."""
    folder = tmp_path_factory.mktemp("clean")
    data = options(folder / "cache", batch=2)
    with Loader(pairs(folder / "shards", {}), data, seed=5) as loader:
        batches = [next(loader) for _ in range(PAIRS // 2)]
    return {tuple(s): part for batch in batches for s, part in zip(batch.sample.tolist(), _records(batch), strict=True)}


def _records(batch: Batch) -> list[tuple[torch.Tensor, ...]]:
    """Images, uid, group and validity of each record."""
    fields = (batch.images, batch.uid, batch.group, batch.valid)
    return [tuple(f[batch.record == record] for f in fields) for record in range(batch.num_records)]


@pytest.mark.parametrize("transport", ["local", "http"])
@pytest.mark.parametrize("name", CASES)
def test_a_fault_is_named_and_counted_and_spoils_nothing_else(
    name: str, transport: str, pairs: Callable[..., Manifest], clean: dict[tuple[int, ...], Any], tmp_path: Path
) -> None:
    case = CASES[name]
    local = pairs(tmp_path / "shards", case.packed)
    table, keys = local.table(BAD_SHARD), local.keys(BAD_SHARD)
    case.damage(local.shard_path(BAD_SHARD), table)
    with serving(local.path) as server:
        manifest = local if transport == "local" else Manifest.open(server.url, cache=str(tmp_path / "cache"))
        reports: list[dict[str, Any]] = []
        ranks = read_epoch(manifest, options(tmp_path / "cache"), reports)
        found = {(r["shard"], r["key"], r["offset"]) for r in reports}
        assert found == {("000001.tar", keys[image // 2], int(table.offset[image])) for image in case.lost}
        assert len(found) == len(reports) == len(case.lost)
        for report in reports:
            assert re.search(case.reason, report["reason"])
        _assert_right_or_masked(ranks, clean, {image // 2 for image in case.lost})
        _assert_stops_above_the_budget(manifest, options(tmp_path / "cache", max_bad_shard_fraction=0.2), len(case.lost))


def _assert_right_or_masked(ranks: list[list[Batch]], clean: dict[tuple[int, ...], Any], lost: set[int]) -> None:
    seen = []
    for batch in (batch for rank in ranks for batch in rank):
        assert (batch.num_records, batch.num_images) == (PAIRS // BATCHES // 2, PAIRS // BATCHES)
        for sample, record in zip(batch.sample.tolist(), _records(batch), strict=True):
            seen.append(tuple(sample))
            masked = sample[1] == BAD_SHARD and sample[2] in lost
            assert record[3].tolist() == [not masked] * 2
            if not masked:
                assert all(torch.equal(one, other) for one, other in zip(record, clean[tuple(sample)], strict=True))
    assert sorted(seen) == sorted(clean)


def _assert_stops_above_the_budget(manifest: Manifest, data: Data, lost: int) -> None:
    report = r"of the 16 images of .*000001\.tar could not .*fraction = 0\.2; the last: 000001\.tar"
    stops = lost > 0.2 * 2 * PER_SHARD
    with Loader(manifest, data, seed=5) as loader, pytest.raises(Unrecoverable, match=report) if stops else nullcontext():
        epoch_of(loader)


@pytest.mark.parametrize("transport", ["local", "http"])
def test_a_missing_shard_stops_every_rank(transport: str, pairs: Callable[..., Manifest], tmp_path: Path) -> None:
    local = pairs(tmp_path / "shards", {})
    local.shard_path(BAD_SHARD).unlink()
    with serving(local.path) as server:
        manifest = local if transport == "local" else Manifest.open(server.url, cache=str(tmp_path / "cache"))
        for rank in (0, 1):
            loader = Loader(manifest, options(tmp_path / "cache"), seed=5, rank=rank, world=2)
            with loader, pytest.raises(Unrecoverable, match=r"000001\.tar.*restore it"):
                epoch_of(loader)
        assert transport == "local" or server.requests["000001.tar"] >= 2 * remote.ATTEMPTS


@pytest.mark.parametrize("harm", ["half", "zeros", "empty"])
def test_a_damaged_cache_file_is_fetched_anew(
    harm: str, pairs: Callable[..., Manifest], clean: dict[tuple[int, ...], Any], tmp_path: Path
) -> None:
    local = pairs(tmp_path / "shards", {})
    with serving(local.path) as server:
        manifest = Manifest.open(server.url, cache=str(tmp_path / "cache"))
        read_epoch(manifest, options(tmp_path / "cache"), [])
        for block in (tmp_path / "cache" / "blocks").rglob("*.4096-8192"):
            block.write_bytes({"half": block.read_bytes()[:2000], "zeros": bytes(4096), "empty": b""}[harm])
        before, reports = sum(server.sent.values()), list[dict[str, Any]]()
        _assert_right_or_masked(read_epoch(manifest, options(tmp_path / "cache"), reports), clean, set())
        assert not reports
        fetched = sum(server.sent.values()) - before
        assert fetched > 0
        _assert_right_or_masked(read_epoch(manifest, options(tmp_path / "cache"), reports), clean, set())
        assert sum(server.sent.values()) - before - fetched <= 3 * 4096  # dropped blocks come once more, and stay


@pytest.mark.parametrize("fault", [500, 503, "short", "whole", "hang"])
def test_a_server_that_fails_now_and_then_changes_nothing(
    fault: int | str, pairs: Callable[..., Manifest], clean: dict[tuple[int, ...], Any], tmp_path: Path
) -> None:
    local = pairs(tmp_path / "shards", {})
    with serving(local.path) as server:
        manifest = Manifest.open(server.url, cache=str(tmp_path / "cache"))
        server.fault = lambda name, number: fault if name.endswith(".tar") and number in (0, 2, 3) else None
        reports: list[dict[str, Any]] = []
        data = options(tmp_path / "cache", timeout_s=1.5 if fault == "hang" else 20)
        _assert_right_or_masked(read_epoch(manifest, data, reports), clean, set())
        assert not reports


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (500, "500.*5 tries"),
        ("short", r"it sent \d+ of \d+ bytes.*5 tries"),
        ("whole", "no range requests"),
        ("hang", r"TimeoutError.*data\.timeout_s"),
    ],
)
def test_a_server_that_keeps_failing_stops_the_run_in_time(
    fault: int | str, message: str, pairs: Callable[..., Manifest], tmp_path: Path
) -> None:
    local = pairs(tmp_path / "shards", {})
    with serving(local.path) as server:
        manifest = Manifest.open(server.url, cache=str(tmp_path / "cache"))
        server.fault = lambda name, number: fault if name == "000001.tar" else None
        began = time.monotonic()
        loader = Loader(manifest, options(tmp_path / "cache", timeout_s=1), seed=5)
        with loader, pytest.raises(RuntimeError, match=rf"(?=.*bytes \d+ to \d+ of .*000001\.tar).*{message}"):
            epoch_of(loader)
        assert time.monotonic() - began < 10


def test_a_read_that_hangs_is_named_and_does_not_keep_close_waiting(pairs: Callable[..., Manifest], tmp_path: Path) -> None:
    manifest = pairs(tmp_path / "shards", {})
    path = manifest.shard_path(BAD_SHARD)
    path.unlink()
    os.mkfifo(path)  # opening it waits for a writer that never comes
    began = time.monotonic()
    loader = Loader(manifest, options(tmp_path, timeout_s=0.5), seed=5)
    with loader, pytest.raises(RuntimeError, match=r"no data for 0\.5 s \(data\.timeout_s\).*000001\.tar at byte \d+"):
        epoch_of(loader)
    assert time.monotonic() - began < 10
    os.close(os.open(path, os.O_RDWR | os.O_NONBLOCK))  # lets the thread go
