"""A pack that is stopped, and where it runs."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Iterable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
from PIL import Image

from pipelines.manifest import Manifest
from pipelines.pack import pack
from pipelines.parallel import in_process, process_map
from pipelines.work import work_folder
from tests.pipelines.test_pack import files_of, make_mess

T = TypeVar("T")
R = TypeVar("R")
MakeClasses = Callable[[Path, dict[str, int]], Path]
Painter = Callable[..., Image.Image]
ROOT = Path(__file__).parent.parent.parent
OPTIONS: dict[str, Any] = {"eval_fraction": 0.3, "max_shard_records": 10, "seed": 4}
SLOW = {"max_side": 100, "max_shard_records": 8}  # with the images of `slow`, about 0.1 s a chunk, 14 chunks


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images that take long to pack: 112 links to two large ones."""
    root = tmp_path_factory.mktemp("slow")
    for i in range(2):
        noise = np.random.default_rng(i).integers(0, 256, (500, 600, 3), dtype=np.uint8)
        Image.fromarray(noise).save(root / f"{i}.jpg", quality=80)
        (root / "images" / f"{i}").mkdir(parents=True)
        for j in range(56):
            os.link(root / f"{i}.jpg", root / "images" / f"{i}" / f"{j}.jpg")
    return root / "images"


def failing_map(after: int, error: BaseException) -> Any:
    """Runs some items, then fails."""

    def run(function: Callable[[T], R], items: Iterable[T]) -> Generator[R, None, None]:
        for number, item in enumerate(items):
            if number == after:
                raise error
            yield function(item)

    return run


def backwards_map(function: Callable[[T], R], items: Iterable[T]) -> Generator[R, None, None]:
    """What a cluster may do: every item twice, the last one first."""
    jobs = list(items)
    results = [(function(item), function(item))[1] for item in reversed(jobs)]
    yield from reversed(results)


def test_every_way_to_run_gives_the_same_bytes(tmp_path: Path, painter: Painter, folder: Path) -> None:
    make_mess(tmp_path / "src", painter)
    for path in sorted(folder.iterdir()):
        (tmp_path / "src" / path.name).symlink_to(path)
    pack(tmp_path / "src", tmp_path / "one", **OPTIONS)
    expected = files_of(tmp_path / "one")
    assert sum(name.endswith(".tar") for name in expected) > 5
    for name, more in {
        "threads": {"workers": 5},
        "processes": {"map": process_map(2)},
        "backwards": {"map": backwards_map},
    }.items():
        summary = pack(tmp_path / "src", tmp_path / name, **OPTIONS, **more)
        assert files_of(tmp_path / name) == expected, name
        assert len(summary.rejected) == 4
    assert {path.name for path in tmp_path.iterdir()} == {"src", "one", "threads", "processes", "backwards"}


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")])
def test_a_pack_goes_on_where_it_was_stopped(tmp_path: Path, folder: Path, error: BaseException) -> None:
    expected = RuntimeError if isinstance(error, OSError) else KeyboardInterrupt
    words = "no space left.*MB are needed.*kept.*out.partial" if isinstance(error, OSError) else None
    with pytest.raises(expected, match=words):
        pack(folder, tmp_path / "out", map=failing_map(3, error), **OPTIONS)
    assert [path.name for path in tmp_path.iterdir()] == ["out.partial"]
    told: list[tuple[int, int | None]] = []
    summary = pack(folder, tmp_path / "out", progress=lambda done, total: told.append((done, total)), **OPTIONS)
    assert summary.resumed_chunks == 3
    assert (told[0], told[-1]) == ((30, 56), (56, 56))
    pack(folder, tmp_path / "whole", **OPTIONS)
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")
    assert {path.name for path in tmp_path.iterdir()} == {"out", "whole"}


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    for _ in range(4000):
        if condition():
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    raise AssertionError("nothing happened")


def test_a_killed_command_goes_on(tmp_path: Path, slow: Path) -> None:
    command = [sys.executable, "-m", "cluster.cli", "pack", str(slow), str(tmp_path / "out"), "--workers", "1", "--json"]
    command += ["--max-side", "100", "--max-shard-records", "8"]
    for number, chunk in ((signal.SIGKILL, "all-000002"), (signal.SIGINT, "all-000005")):
        process = subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        wait_for((tmp_path / "out.partial" / "chunks" / chunk).is_dir, process)
        process.send_signal(number)
        _, told = process.communicate(timeout=60)
        assert [path.name for path in tmp_path.iterdir()] == ["out.partial"]
    assert process.returncode == 130
    assert "the same command goes on" in told
    assert "Traceback" not in told
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["resumed_chunks"] >= 6
    pack(slow, tmp_path / "whole", **SLOW)
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")


def test_worker_processes_end_with_a_parent_that_is_killed(tmp_path: Path, slow: Path) -> None:
    code = (
        "from pathlib import Path; from pipelines.pack import pack; from pipelines.parallel import process_map\n"
        f"pack({str(slow)!r}, Path({str(tmp_path / 'out')!r}), map=process_map(2), **{SLOW!r})"
    )
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, text=True, stderr=subprocess.PIPE)
    wait_for((tmp_path / "out.partial" / "chunks" / "all-000000").is_dir, process)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    process.kill()
    process.communicate()
    assert len(children) >= 2
    for _ in range(1000):
        alive = [child for child in children if Path(f"/proc/{child}/exe").exists()]
        if not alive:
            break
        time.sleep(0.01)
    assert not alive


def test_other_options_or_another_source_do_not_go_on(tmp_path: Path, make_classes: MakeClasses) -> None:
    source = make_classes(tmp_path / "src", {"a": 8, "b": 8})
    with pytest.raises(KeyboardInterrupt):
        pack(source, tmp_path / "out", max_shard_records=4, map=failing_map(2, KeyboardInterrupt()))
    before = files_of(tmp_path)
    with pytest.raises(ValueError, match=r"out\.partial.*max_shard_records: 4 then, 5 now.*remove it"):
        pack(source, tmp_path / "out", max_shard_records=5)
    (source / "a" / "im 0.png").write_bytes((source / "a" / "im 1.png").read_bytes())
    with pytest.raises(ValueError, match=r"out\.partial.*before the source changed.*remove it"):
        pack(source, tmp_path / "out", max_shard_records=4)
    (source / "a" / "im 0.png").unlink()
    with pytest.raises(ValueError, match="before the source changed"):
        pack(source, tmp_path / "out", max_shard_records=4)
    after = files_of(tmp_path)
    assert {name for name in before if before[name] != after.get(name)} == {"src/a/im 0.png"}


def test_two_packs_do_not_share_a_folder(tmp_path: Path, folder: Path) -> None:
    with work_folder(tmp_path / "out", {}), pytest.raises(ValueError, match=r"another process is at work in .*out\.partial"):
        pack(folder, tmp_path / "out")
    with pytest.raises(ValueError, match="begun with other options"):
        pack(folder, tmp_path / "out")


def test_a_folder_that_only_has_the_name_is_not_touched(tmp_path: Path, folder: Path) -> None:
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "mine").write_text("precious")
    with pytest.raises(ValueError, match="no unfinished work"):
        pack(folder, tmp_path / "out")
    assert (tmp_path / "out.partial" / "mine").read_text() == "precious"


def test_a_pack_that_dies_while_it_moves_shards_goes_on(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def die(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("pipelines.pack.publish", die)
        with pytest.raises(KeyboardInterrupt):
            pack(folder, tmp_path / "out", **OPTIONS)
    assert pack(folder, tmp_path / "out", **OPTIONS).resumed_chunks == 7
    pack(folder, tmp_path / "whole", map=in_process, **OPTIONS)
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")
    Manifest.open(tmp_path / "out" / "train")
