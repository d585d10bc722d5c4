"""Packing as Ray tasks, and what `nearfar pack` tells."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from cluster.progress import bar
from tests.conftest import Answer
from tests.pipelines.conftest import fill_classes
from tests.pipelines.test_pack import files_of

Nearfar = Callable[..., Answer]
ROOT = Path(__file__).parents[2]


# In a process of its own: where Ray cannot go on it ends the process that it is in.
WITH_RAY = """
import errno, sys
from pathlib import Path
from cluster import cli
from cluster.tasks import ray_map

if __name__ == "__main__":
    source = Path(sys.argv[1])
    with ray_map(None, 2) as (run, tasks):
        assert tasks == 2
        assert list(run(Path.stat, [source] * 9)) == [source.stat()] * 9
        for _ in range(500):  # a fault of how a failed task is left would be a race
            try:
                list(run(Path.read_bytes, [source]))
            except IsADirectoryError as error:
                assert error.errno == errno.EISDIR
            else:
                raise AssertionError("nothing was raised")
        sys.argv[:] = ["nearfar", "pack", *sys.argv[1:]]
        cli.main()
"""


def test_ray_tasks_give_the_bytes_of_one_process(nearfar: Nearfar, tmp_path: Path) -> None:
    source = fill_classes(tmp_path / "images", {"a": 30, "b": 31})
    (source / "a" / "bad.png").write_bytes(b"no image")
    options = ["--max-shard-records", "10", "--eval-fraction", "0.2", "--split", "record", "--json"]
    command = [sys.executable, "-c", WITH_RAY, str(source), str(tmp_path / "ray"), "--ray", "--workers", "2", *options]
    with_ray = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, timeout=180, check=False)
    assert with_ray.returncode == 0, with_ray.stderr
    alone = nearfar("pack", source, tmp_path / "alone", "--workers", 1, *options)
    assert files_of(tmp_path / "ray") == files_of(tmp_path / "alone")
    told = json.loads(with_ray.stdout)
    assert (told["sets"]["train"]["records"], told["sets"]["eval"]["records"]) == (49, 12)
    assert told["rejected"] == json.loads(alone.out)["rejected"] == [["a/bad.png", "not an image of a known format"]]


def test_the_summary_tells_sizes_speed_and_what_was_left_out(nearfar: Nearfar, tmp_path: Path) -> None:
    source = fill_classes(tmp_path / "images", {"a": 5, "b": 4})
    for i in range(3):
        (source / "a" / f"bad {i}.png").write_bytes(b"no image" if i else b"")
    answer = nearfar("pack", source, tmp_path / "out", "--max-side", 16, "--quality", 50)
    assert answer.code == 0, answer.err
    assert "9 records, 9 images, 2 classes, 1 shards" in answer.out
    assert "3 images left out; 2 not an image of a known format; 1 the file is empty" in answer.out
    assert "images/s" in answer.out
    assert "packing: 12/12 images" in answer.err
    with Image.open(next(iter(source.rglob("im*.png")))) as image:
        assert max(image.size) > 16


def test_speed_and_time_left_start_with_the_first_report(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [0.0]
    monkeypatch.setattr("cluster.progress.time.monotonic", lambda: now[0])
    with bar("packing", "images") as report:
        for now[0], done in ((0.0, 1000), (10.0, 1500), (20.0, 3000), (30.0, 4000)):  # 1000 were there already
            report(done, 4000)
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "packing: 1000/4000 images",
        "packing: 1500/4000 images 50 images/s, 0:00:50 left",
        "packing: 3000/4000 images 100 images/s, 0:00:10 left",
        "packing: 4000/4000 images 100 images/s",
    ]
