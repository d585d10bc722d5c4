"""Remote data gives the same batches as local data, and every byte of it is fetched once for a whole node."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

import fsspec
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch.distributed as dist

from cluster.paths import absolute
from configs.load import parse_config
from configs.schema import Data
from pipelines import remote
from pipelines.cache import NodeCache
from pipelines.manifest import Manifest
from pipelines.stream import Loader, evaluation_batches
from tests.pipelines.servers import RangeServer, serving
from tests.pipelines.streams import assert_equal, settings, take
from tests.ranks import run_ranks

KIB = 1 / 1024  # of a MiB


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "FIRST_PAUSE_S", 0.01)


@pytest.fixture
def server(many_shards: Manifest) -> Iterator[RangeServer]:
    with serving(many_shards.path) as running:
        yield running


@pytest.fixture
def bucket(many_shards: Manifest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The shards in S3, served by moto."""
    from moto.server import ThreadedMotoServer

    moto = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    moto.start()
    for name, value in {"ACCESS_KEY_ID": "test", "SECRET_ACCESS_KEY": "test", "DEFAULT_REGION": "us-east-1"}.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://{}:{}".format(*moto.get_host_and_port()))
    files = fsspec.filesystem("s3", skip_instance_cache=True)
    files.mkdir("shards")
    files.put(str(many_shards.path), "shards/train", recursive=True)
    yield "s3://shards/train"
    files.clear_instance_cache()
    moto.stop()


@pytest.fixture
def in_memory(many_shards: Manifest) -> Iterator[str]:
    root = f"memory://{uuid.uuid4().hex}"
    files = fsspec.filesystem("memory")
    files.put(str(many_shards.path), root, recursive=True)
    yield root
    files.rm(root, recursive=True)


def cached(folder: Path, **values: Any) -> Data:
    return settings(**{"cache": str(folder), "block_mb": 4 * KIB, "timeout_s": 20, **values})


@pytest.mark.parametrize("where", ["in_memory", "server", "bucket"])
def test_batches_are_those_of_local_data(
    where: str, many_shards: Manifest, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    place = request.getfixturevalue(where)
    manifest = Manifest.open(getattr(place, "url", place), cache=str(tmp_path))
    data = cached(tmp_path, per_class=2)
    for one, other in zip(take(many_shards, data, 7), take(manifest, data, 7), strict=True):
        assert_equal(one, other)
    for one, other in zip(evaluation_batches(many_shards, data), evaluation_batches(manifest, data), strict=True):
        assert_equal(one, other)
    assert [manifest.keys(shard) for shard in range(3)] == [many_shards.keys(shard) for shard in range(3)]
    assert manifest.class_counts == many_shards.class_counts


def run_epoch(url: str, cache: Path, batches: int) -> dict[str, float]:
    rank, world = dist.get_rank(), dist.get_world_size()
    manifest = Manifest.open(url, cache=str(cache))
    with Loader(manifest, cached(cache), seed=5, rank=rank, world=world) as loader:
        for _ in range(batches):
            next(loader)
    return loader.counts  # after closing, when nothing is on its way any more


def test_two_ranks_of_a_node_fetch_every_byte_once(many_shards: Manifest, server: RangeServer, tmp_path: Path) -> None:
    counts = run_ranks(2, run_epoch, server.url, tmp_path, many_shards.num_samples // 8)
    nbytes = {many_shards.shard_file(i).name: int(n) for i, n in enumerate(many_shards.nbytes)}
    amplification = server.amplification(nbytes)
    assert min(amplification.values()) > 0
    assert max(amplification.values()) <= 1.05
    assert sum(one["bytes_fetched"] for one in counts) == sum(server.sent[name] for name in nbytes)
    assert sum(one["cache_hits"] for one in counts) > 0
    left = [path for path in tmp_path.rglob("*") if path.is_file() and path.suffix in (".tmp", ".lock")]
    assert [path.name for path in left] in ([], ["sweep.lock"])


def test_what_was_fetched_serves_the_next_run(many_shards: Manifest, server: RangeServer, tmp_path: Path) -> None:
    manifest = Manifest.open(server.url, cache=str(tmp_path))
    first = take(manifest, cached(tmp_path), 7)
    server.fault = lambda name, number: 500
    for one, other in zip(first, take(manifest, cached(tmp_path), 7), strict=True):
        assert_equal(one, other)


def test_data_packed_anew_at_the_same_url_is_not_mixed_with_what_was_there(
    many_shards: Manifest, triplets: Manifest, tmp_path: Path
) -> None:
    place, cache = tmp_path / "place", tmp_path / "cache"
    with serving(place) as server:
        for packed in (triplets, many_shards):
            shutil.rmtree(place, ignore_errors=True)
            shutil.copytree(packed.path, place)
            manifest = Manifest.open(server.url, cache=str(cache))
            for one, other in zip(take(manifest, cached(cache), 7), take(packed, settings(), 7), strict=True):
                assert_equal(one, other)
            assert packed.shard_file(0).sha256 in {path.name.partition(".")[0] for path in (cache / "blocks").rglob("*")}


def cached_bytes(cache: Path) -> int:
    total = 0
    for path in (cache / "blocks").rglob("*"):
        with contextlib.suppress(FileNotFoundError):  # swept just now
            total += path.stat().st_size if path.is_file() and path.suffix not in (".lock", ".tmp") else 0
    return total


def test_the_cache_stays_below_its_budget_and_results_do_not_change(
    many_shards: Manifest, server: RangeServer, tmp_path: Path
) -> None:
    manifest = Manifest.open(server.url, cache=str(tmp_path))
    data = cached(tmp_path, cache_gb=40e-6, prefetch=1)
    with Loader(manifest, data, seed=5) as loader:
        for expected in take(many_shards, data, 7):
            assert_equal(next(loader), expected)
            until = time.monotonic() + 20  # what is being fetched ahead is swept a moment after it appears
            while cached_bytes(tmp_path) > 40_000:
                assert time.monotonic() < until
                time.sleep(0.01)
    assert int(many_shards.nbytes.sum()) > 40_000


def test_the_least_recently_used_file_goes_first(tmp_path: Path) -> None:
    cache = NodeCache(str(tmp_path), 1000)

    def write(file: IO[bytes]) -> None:
        file.write(b"x" * 300)

    for age, name in enumerate(["old", "newer"]):
        cache.open(f"blocks/{name}", write, timeout_s=1)
        os.utime(tmp_path / "blocks" / name, (age + 1, age + 1))
    assert not cache.open("blocks/old", write, timeout_s=1)[1]  # used again: now `newer` is the older one
    cache.open("blocks/third", write, timeout_s=1)
    assert {path.name for path in (tmp_path / "blocks").iterdir()} == {"old", "third"}


def test_many_who_want_a_file_wait_for_one_writer(tmp_path: Path) -> None:
    writers = []
    ready = threading.Barrier(8)

    def write(file: IO[bytes]) -> None:
        writers.append(threading.get_ident())
        file.write(b"whole")

    def ask() -> tuple[bytes, bool]:
        cache = NodeCache(str(tmp_path), 10**6)
        ready.wait()
        found, fetched = cache.open("blocks/name", write, timeout_s=5)
        return found.read(9, 0), fetched

    with ThreadPoolExecutor(8) as pool:
        answers = [task.result() for task in [pool.submit(ask) for _ in range(8)]]
    assert len(writers) == 1
    assert sorted(answers) == [(b"whole", False)] * 7 + [(b"whole", True)]


def test_a_writer_that_fails_leaves_nothing(tmp_path: Path) -> None:
    cache = NodeCache(str(tmp_path), 10**6)

    def fail(file: IO[bytes]) -> None:
        file.write(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(RuntimeError, match=r"No space left on device; free some space, lower data\.cache_gb"):
        cache.open("blocks/name", fail, timeout_s=1)
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.suffix != ".lock"]


def test_a_local_manifest_may_name_remote_shards(many_shards: Manifest, server: RangeServer, tmp_path: Path) -> None:
    place = tmp_path / "index"
    shutil.copytree(many_shards.path, place, ignore=shutil.ignore_patterns("*.tar"))
    shards = pyarrow.parquet.read_table(place / "shards.parquet")
    urls = pa.array([f"{server.url}/{name}" for name in shards["url"].to_pylist()])
    pyarrow.parquet.write_table(shards.set_column(shards.schema.get_field_index("url"), "url", urls), place / "shards.parquet")
    data = cached(tmp_path / "cache")
    for one, other in zip(take(many_shards, data, 7), take(Manifest.open(place), data, 7), strict=True):
        assert_equal(one, other)
    assert server.sent["000000.tar"] > 0


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("memory://nothing/here", "no manifest.json at memory://nothing/here"),
        ("nonsense://somewhere", "cannot be opened: .*nonsense"),
    ],
)
def test_a_url_without_data_is_refused(url: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        Manifest.open(url, cache=str(tmp_path))


def test_a_server_that_is_down_is_named(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"cannot fetch http://127\.0\.0\.1:9/x/manifest\.json: .*5 tries"):
        Manifest.open("http://127.0.0.1:9/x", cache=str(tmp_path))


def test_urls_stay_as_they_are_and_the_cache_becomes_absolute() -> None:
    data = {"train": "s3://bucket/train", "eval": "https://host/eval", "cache": "blocks"}
    config = absolute(parse_config({"name": "x", "data": data, "train": {"steps": 1}}))
    assert (config.data.train[0].path, config.data.eval) == ("s3://bucket/train", "https://host/eval")
    assert config.data.cache == str(Path("blocks").absolute())


def test_a_program_that_does_not_close_its_loader_ends_at_once(server: RangeServer, tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "from tests.pipelines.test_remote import *\n"
        "loader = Loader(Manifest.open(sys.argv[1], cache=sys.argv[2]), cached(Path(sys.argv[2]), threads=3), seed=1)\n"
        "print(len(next(loader).images))\n"
    )
    command = [sys.executable, "-c", code, server.url, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=Path(__file__).parents[2])
    assert (done.returncode, done.stdout, done.stderr) == (0, "8\n", "")
