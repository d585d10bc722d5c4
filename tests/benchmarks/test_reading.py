"""What reading remote shards costs, in bytes and in images/s: `make bench`. No time is asserted."""

from __future__ import annotations

import io
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from configs.schema import Data
from pipelines.manifest import Manifest
from pipelines.manifest_writer import ManifestWriter
from pipelines.prepare import prepare
from pipelines.records import LocalFile, Record
from pipelines.shards import ShardWriter
from pipelines.stream import Loader
from tests.benchmarks.measure import table
from tests.pipelines.servers import RangeServer, serving

pytestmark = pytest.mark.benchmark

IMAGES, SHARD_BYTES, BLOCK_MB, BATCH, LANES = 4096, 1_500_000, 16 / 1024, 256, 16


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """4096 images of about 3 KB."""
    rng = np.random.default_rng(0)
    out = tmp_path_factory.mktemp("packed") / "shards"
    manifest = ManifestWriter(out, "labelled")
    with ShardWriter(out, "labelled", manifest.add, max_bytes=SHARD_BYTES, class_index={"a": 0, "b": 1}) as writer:
        for number in range(IMAGES):
            buffer = io.BytesIO()
            coarse = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
            coarse.resize((96, 96), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
            record = Record((LocalFile(Path(f"{number}.jpg"), f"{number}.jpg"),), "ab"[number * 2 // IMAGES])
            writer.write(number, record, [prepare(buffer.getvalue())])
    manifest.finish()
    return Manifest.open(out)


@pytest.fixture
def server(packed: Manifest) -> Iterator[RangeServer]:
    with serving(packed.path) as running:
        yield running


def settings(cache: Path) -> Data:
    values = {"batch": BATCH, "lanes": LANES, "window": 64, "image_size": 32, "block_mb": BLOCK_MB, "cache": str(cache)}
    return Data.model_validate({"train": "x", **values})


def read_epoch(location: str | Path, cache: Path, rank: int = 0, world: int = 1) -> float:
    """images/s"""
    manifest = Manifest.open(location, cache=str(cache))
    with Loader(manifest, settings(cache), seed=1, rank=rank, world=world) as loader:
        started = time.perf_counter()
        for _ in range(IMAGES // BATCH):
            next(loader)
        return IMAGES / world / (time.perf_counter() - started)


def test_bytes_fetched_by_world_size(packed: Manifest, server: RangeServer, tmp_path: Path) -> None:
    rows = []
    for world in (1, 2, 4, 8):
        found = {}
        for shared in (True, False):
            server.sent.clear()
            for rank in range(world):
                read_epoch(server.url, tmp_path / f"{world} {shared} {0 if shared else rank}", rank, world)
            tars = sum(size for name, size in server.sent.items() if name.endswith(".tar"))
            found[shared] = tars / int(packed.nbytes.sum())
        rows.append((world, f"{found[True]:.3f}", f"{found[False]:.3f}"))
        assert found[True] <= 1.05
    table(
        f"bytes fetched in an epoch over the bytes there are ({int(packed.nbytes.sum()) / 1e6:.1f} MB, {LANES} lanes)",
        ("ranks", "one node, shared cache", "each on a node of its own"),
        rows,
    )


def test_images_per_second_by_place(packed: Manifest, server: RangeServer, tmp_path: Path) -> None:
    speeds = {
        "local": read_epoch(packed.path, tmp_path),
        "http on this machine, first epoch": read_epoch(server.url, tmp_path),
        "http on this machine, from the cache": read_epoch(server.url, tmp_path),
    }
    table(
        f"reading with 2 threads, blocks of {BLOCK_MB * 1024:.0f} KiB",
        ("where", "images/s"),
        [(name, f"{speed:.0f}") for name, speed in speeds.items()],
    )
