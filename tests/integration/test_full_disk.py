"""A disk that fills up under a run: one message that names the file, and once there is space again the same curve."""

from __future__ import annotations

import subprocess
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster import attempts
from cluster.runfolder import MetricsFile, RunFolder, read_lines, write_atomically
from configs.errors import DiskFull, Unrecoverable
from tests.integration.conftest import Reference
from tests.integration.test_checkpoints import curve as points
from tests.integration.test_checkpoints import train as train_here
from tests.kills import Watched
from tests.runs import PATIENCE_S, assert_equal, start, train, wait_for
from tests.small_disk import fill, small_disk
from trainer import checkpoints

NO_SPACE = "No space left on device"


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    with small_disk(tmp_path / "disk", kib=8192) as folder:
        yield folder


def test_a_line_is_there_whole_or_not_at_all(disk: Path) -> None:
    fill(disk, leave_kib=4)
    metrics = MetricsFile(disk / "metrics.jsonl")
    with pytest.raises(DiskFull, match=rf"cannot write {disk}/metrics.jsonl: {NO_SPACE}; free some space"):
        log(metrics, range(99))
    written = [row["step"] for row in read_lines(disk / "metrics.jsonl")]
    assert 0 < len(written) < 99
    assert (disk / "metrics.jsonl").read_bytes().endswith(b"\n")
    (disk / "ballast").unlink()
    log(metrics, range(len(written), 99))
    assert [row["step"] for row in read_lines(disk / "metrics.jsonl")] == list(range(99))


def log(metrics: MetricsFile, steps: Iterable[int]) -> None:
    for step in steps:
        metrics.append(step, {"train/loss": 1 / (step + 1)}, at=0.0)


def test_what_is_written_anew_stays_as_it_was(disk: Path) -> None:
    write_atomically(disk / "config.yaml", "before")
    fill(disk, leave_kib=0)
    with pytest.raises(DiskFull, match=r"cannot write .*config.yaml"):
        write_atomically(disk / "config.yaml", "after")
    assert (disk / "config.yaml").read_text() == "before"
    assert sorted(path.name for path in disk.iterdir()) == ["ballast", "config.yaml"]


def test_a_start_that_cannot_be_noted_is_refused_for_good(disk: Path) -> None:
    fill(disk, leave_kib=0)
    with pytest.raises(Unrecoverable, match=r"cannot write .*attempts.jsonl"):
        attempts.begin(RunFolder(disk), launch="1", world=2, from_step=0, skipped=[], more={})
    assert list(read_lines(disk / "attempts.jsonl")) == []


@pytest.mark.parametrize("elsewhere", [True, pytest.param(False, marks=pytest.mark.acceptance)])
def test_a_run_stops_and_goes_on_when_there_is_space_again(config_file: Path, disk: Path, elsewhere: bool) -> None:
    """`elsewhere`: the checkpoints are on a disk with room, so that the metrics have to meet the full one."""
    expected = points(train_here(config_file, "never"))
    storage = [f"cluster.storage={disk}", *([f"cluster.checkpoints={disk.parent / 'kept'}"] if elsewhere else [])]
    ballast = fill(disk, leave_kib=8 if elsewhere else 1024)
    with pytest.raises(Unrecoverable, match=f"cannot write .*: {NO_SPACE}; free some space"):
        train_here(config_file, "full", *storage)
    assert len(list(read_lines(disk / "full" / "attempts.jsonl"))) == 1
    ballast.unlink()
    assert points(train_here(config_file, "full", *storage)) == expected


def failed(driver: subprocess.Popen[str]) -> list[str]:
    """What a run that ended with a message told, but for its progress; the last line is the message."""
    _, err = driver.communicate(timeout=PATIENCE_S)
    assert driver.returncode == 1, err
    assert "Traceback" not in err
    told = [line for line in err.splitlines() if not line.startswith(("full: ", "nodes: ", "training: ", "step "))]
    assert told[-1].startswith("nearfar: run 'full' stopped: cannot write "), err
    assert f": {NO_SPACE}; free some space" in told[-1]
    return told


def filled_up(reference: Reference, disk: Path, *settings: str, leave_kib: int, **how: Any) -> subprocess.Popen[str]:
    """A run whose disk fills up once it has a checkpoint."""
    driver = start(reference[0], "full", f"cluster.storage={disk}", "cluster.workers=2", *settings, **how)
    run = Watched(driver, disk / "full")
    wait_for(lambda: run.logged() > 6 and not run.writes_checkpoint(), driver)
    fill(disk, leave_kib=leave_kib)
    return driver


@pytest.mark.acceptance
@pytest.mark.parametrize("local", [True, False])
def test_a_full_disk_under_two_workers_gives_one_message_and_costs_nothing_but_time(
    small: Reference, disk: Path, local: bool
) -> None:
    size = sum(path.stat().st_size for path in (Path(small[1]["run"]) / "checkpoints" / "step-00000030").iterdir())
    driver = filled_up(small, disk, leave_kib=size // 2048, local=local)
    told = failed(driver)
    assert f"cannot write the checkpoint {disk}/full/checkpoints/step-" in told[-1]
    assert not local or len(told) == 1, "one message"
    assert len(list(read_lines(disk / "full" / "attempts.jsonl"))) == 1, "it is not tried again"
    found = checkpoints.search(disk / "full" / "checkpoints")
    assert found.saved is not None
    assert found.skipped == ()
    (disk / "ballast").unlink()
    assert_equal(train(small[0], "full", f"cluster.storage={disk}", "cluster.workers=2", local=local, resume=True), small[1])


@pytest.mark.acceptance
@pytest.mark.parametrize("local", [True, False])
def test_metrics_that_cannot_be_written_stop_two_workers_for_good(small: Reference, disk: Path, local: bool) -> None:
    kept = f"cluster.checkpoints={disk.parent / 'kept'}"
    told = failed(filled_up(small, disk, kept, leave_kib=0, local=local))
    assert f"cannot write {disk}/full/" in told[-1]
    assert not local or len(told) == 1, "one message"
    assert len(list(read_lines(disk / "full" / "attempts.jsonl"))) == 1, "it is not tried again"
    again = start(small[0], "full", f"cluster.storage={disk}", kept, "cluster.workers=2", local=local, resume=True)
    _, err = again.communicate(timeout=PATIENCE_S)
    assert again.returncode != 0
    assert f"cannot write {disk}/full/config.yaml: {NO_SPACE}" in err.splitlines()[-1]
    assert "Traceback" not in err
    (disk / "ballast").unlink()
    found = train(small[0], "full", f"cluster.storage={disk}", kept, "cluster.workers=2", local=local, resume=True)
    assert_equal(found, small[1])
