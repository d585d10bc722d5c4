"""Ranks as processes: one reason for all, and nobody is left."""

from __future__ import annotations

import os
import signal
import time
from functools import partial
from pathlib import Path

import pytest

from cluster.processes import RankFailed, run_ranks


def meet(rank: int, folder: Path, *, out: Path) -> None:
    (folder / f"here-{rank}").touch()
    (out / str(rank)).write_text(str(os.getpid()))
    while len(list(folder.glob("here-*"))) < 2:
        time.sleep(0.01)


def fail(rank: int, folder: Path, *, out: Path, how: str) -> None:
    meet(rank, folder, out=out)
    if rank == 0:
        if how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if how == "exit":
            os._exit(3)
        raise ValueError("no more of this")
    time.sleep(0.3)
    if how != "hang":
        raise RuntimeError("the other one is gone")
    while True:
        time.sleep(1)


def alive(out: Path) -> bool:
    return any(Path(f"/proc/{path.read_text()}").exists() for path in out.iterdir())


def test_all_ranks_work_in_processes_of_their_own(tmp_path: Path) -> None:
    run_ranks(2, partial(meet, out=tmp_path))
    assert len({os.getpid(), *(int((tmp_path / str(rank)).read_text()) for rank in range(2))}) == 3
    assert not alive(tmp_path)


@pytest.mark.parametrize(
    ("how", "message", "killed"),
    [
        ("kill", r"^rank 0 was killed by SIGKILL; the system does so too when memory runs out$", True),
        ("raise", r"^rank 0: ValueError: no more of this$", False),
        ("exit", r"^rank 1: RuntimeError: the other one is gone$", False),  # all that was said
    ],
)
def test_the_rank_that_was_the_cause_is_told(tmp_path: Path, how: str, message: str, killed: bool) -> None:
    with pytest.raises(RankFailed, match=message) as caught:
        run_ranks(2, partial(fail, out=tmp_path, how=how))
    assert caught.value.killed == killed
    assert not alive(tmp_path)


def test_a_rank_that_does_not_end_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cluster.processes.PATIENCE_S", 0.5)
    with pytest.raises(RankFailed, match="no more of this"):
        run_ranks(2, partial(fail, out=tmp_path, how="hang"))
    assert not alive(tmp_path)


def stand_still(rank: int, folder: Path, *, out: Path) -> None:
    meet(rank, folder, out=out)
    if rank == 1:
        os.kill(os.getpid(), signal.SIGSTOP)


def test_a_rank_that_stands_still_when_the_others_are_done_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cluster.processes.PATIENCE_S", 0.5)
    with pytest.raises(RankFailed, match="rank 1 hung: others have long ended"):
        run_ranks(2, partial(stand_still, out=tmp_path), timeout_s=1)
    assert not alive(tmp_path)
