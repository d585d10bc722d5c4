"""The loader in processes of its own gives what it gives in this one, and leaves nothing behind."""

from __future__ import annotations

import functools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from cluster.runfolder import append_line, read_lines
from configs.errors import Unrecoverable
from configs.schema import Data
from pipelines.apart import LoaderApart
from pipelines.manifest import Manifest
from pipelines.stream import Loader
from tests.pipelines.streams import assert_equal, settings
from tests.pipelines.test_bad_images import damaged as damaged  # a fixture, as the others
from tests.pipelines.test_vectors import packed as packed
from tests.pipelines.test_vectors import truth as truth
from tests.runs import ended

ROOT = Path(__file__).parents[2]


def both(manifest: Manifest, data: Data, **options: Any) -> tuple[Loader, LoaderApart]:
    return Loader(manifest, data, seed=5, **options), LoaderApart(data, seed=5, **options)


CASES: list[dict[str, Any]] = [
    {"threads": 2},
    {"threads": 9},  # three processes
    {"threads": 8, "position": 24, "rank": 1, "world": 3},
    {"threads": 8, "piece": 3},  # pieces of 3, 3 and 2 records for two processes
    {"threads": 64, "rank": 1, "world": 2},  # as many processes as records
]


@pytest.mark.parametrize("case", CASES)
def test_it_gives_the_same_batches_and_counts(triplets: Manifest, case: dict[str, Any]) -> None:
    options = {name: value for name, value in case.items() if name != "threads"}
    here, there = both(triplets, settings(train=str(triplets.path), threads=case["threads"]), **options)
    with here, there:
        assert there.counts.keys() == here.counts.keys()
        for _ in range(3):
            one, other = next(here), next(there)
            assert_equal(one, other)
            assert other.images.stride() == one.images.stride()
            assert there.position == here.position
        assert there.counts["bytes_read"] > 0
        assert there.wait_s > 0


def test_balanced_batches_stay_as_they_were(labelled: Manifest) -> None:
    here, there = both(labelled, settings(train=str(labelled.path), per_class=2, threads=8))
    with here, there:
        batches = [(next(here), next(there)) for _ in range(4)]
    for one, other in batches:
        assert_equal(one, other)


def test_vectors_and_targets_of_all_processes_are_put_in_order(packed: Manifest) -> None:
    here, there = both(packed, settings(train=str(packed.path), threads=12))
    with here, there:
        for _ in range(3):
            assert_equal(next(here), next(there))


def test_unreadable_images_are_told_of_and_too_many_stop_the_run(damaged: tuple[Manifest, set[str]], tmp_path: Path) -> None:
    manifest, keys = damaged
    data = settings(train=str(manifest.path), batch=56, max_bad_fraction=0.01)
    with LoaderApart(data, seed=5, on_bad=functools.partial(append_line, tmp_path / "bad")) as loader:
        batch = next(loader)
        assert int((~batch.valid).sum()) == loader.counts["bad_images"] == 2
        with pytest.raises(Unrecoverable, match="max_bad_fraction"):
            next(loader)
    assert {row["key"] for row in read_lines(tmp_path / "bad")} == keys


def test_what_the_loader_refuses_comes_with_the_first_batch(tmp_path: Path) -> None:
    with LoaderApart(settings(train=str(tmp_path)), seed=5) as loader, pytest.raises(ValueError, match="manifest"):
        next(loader)


def test_a_process_that_is_killed_is_told_of(labelled: Manifest) -> None:
    with LoaderApart(settings(train=str(labelled.path)), seed=5) as loader:
        next(loader)
        os.kill(_pid(loader), signal.SIGINT)  # is for the rank
        os.kill(_pid(loader), signal.SIGTERM)
        next(loader)
        os.kill(_pid(loader), signal.SIGKILL)
        with pytest.raises(RuntimeError, match="exit code -9"):
            list(loader)
        with pytest.raises(RuntimeError, match="closed"):
            next(loader)


def _pid(loader: LoaderApart) -> int:
    pid = loader._processes[0].process.pid
    assert pid is not None
    return pid


@pytest.mark.parametrize("end", ["loader.close()", "", "os._exit(0)", "os.kill(os.getpid(), 9)"])
def test_its_process_ends_with_the_rank_however_that_ends(labelled: Manifest, end: str) -> None:
    code = f"""
import os
from pipelines.apart import LoaderApart
from tests.pipelines.streams import settings
if __name__ == "__main__":
    loader = LoaderApart(settings(train={str(labelled.path)!r}), seed=5)
    next(loader)
    print(loader._processes[0].process.pid, flush=True)
    {end}
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stderr == ""
    deadline = time.monotonic() + 20
    while not ended(int(done.stdout)):
        assert time.monotonic() < deadline
        time.sleep(0.05)
