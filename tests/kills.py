"""`kill -9` at a chosen place. All processes of a run are stopped first: what they are in the middle of can then be seen."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cluster.runfolder import read_lines
from tests.runs import ended, ranks, stopped, wait_for

AGAIN_S = 0.001
ENDED_WITHIN_S = 30


@dataclass(frozen=True, slots=True)
class Watched:
    """A run that trains: its driver, and its folder."""

    driver: subprocess.Popen[str]
    run: Path

    def logged(self) -> int:
        """The last step in metrics.jsonl; -1 before the first."""
        return max((row["step"] for row in read_lines(self.run / "metrics.jsonl")), default=-1)

    def writes_checkpoint(self) -> bool:
        """Whether a temporary folder is there, which lives until it is renamed."""
        return any((self.run / "checkpoints").glob(".step-*"))

    def evaluates(self) -> bool:
        """Whether a rank has a shard of the evaluation's open, which lasts for one pass."""
        return any(_reads(rank, "/eval/") for rank in ranks(self.driver))


Place = Callable[[Watched], bool]


def in_the_step(watched: Watched) -> bool:
    return not watched.writes_checkpoint() and not watched.evaluates()


def while_checkpointing(watched: Watched) -> bool:
    return watched.writes_checkpoint()


def while_evaluating(watched: Watched) -> bool:
    return watched.evaluates()


PLACES: dict[str, Place] = {
    "in the step": in_the_step,
    "while checkpointing": while_checkpointing,
    "while evaluating": while_evaluating,
}


def kill(driver: subprocess.Popen[str], run: Path, place: Place, *, after: int, alone: bool = False) -> int:
    """Kill driver and ranks at once at `place`, once step `after` is logged; returns the last step that was logged.

    `alone`: kill the driver only. The ranks must end all the same.
    """
    watched = Watched(driver, run)
    wait_for(lambda: watched.logged() >= after, driver)
    while True:
        wait_for(lambda: place(watched), driver, every_s=0)
        everyone = _stop(driver)
        if place(watched):
            break
        os.killpg(driver.pid, signal.SIGCONT)  # too late: it is over
        time.sleep(AGAIN_S)
    last = watched.logged()
    if alone:
        driver.kill()
    else:
        os.killpg(driver.pid, signal.SIGKILL)
    driver.wait()
    _until(lambda: all(map(ended, everyone)), "a rank outlives its driver")
    assert watched.logged() == last
    return last


def kill_alone(driver: subprocess.Popen[str], workers: list[int]) -> None:
    """The driver as it runs; see that its ranks end."""
    driver.kill()
    driver.wait()
    _until(lambda: all(map(ended, workers)), "a rank outlives its driver")


def _stop(driver: subprocess.Popen[str]) -> set[int]:
    """All processes of a run, once they stand still."""
    everyone = {driver.pid, *ranks(driver)}
    os.killpg(driver.pid, signal.SIGSTOP)
    _until(lambda: all(map(stopped, everyone)), "a process does not stop")
    return everyone


def _until(condition: Callable[[], bool], otherwise: str) -> None:
    deadline = time.monotonic() + ENDED_WITHIN_S
    while not condition():
        assert time.monotonic() < deadline, otherwise
        time.sleep(AGAIN_S)


def readers(folder: Path) -> list[int]:
    """The processes of this machine that have a shard of `folder` open: Ray's workers are not the driver's children."""
    numbers = [int(process.name) for process in Path("/proc").glob("[0-9]*")]
    return [number for number in numbers if _reads(number, str(folder))]


def _reads(process: int, folder: str) -> bool:
    """Whether it has a shard open whose path holds `folder`."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError, PermissionError):
        for handle in Path(f"/proc/{process}/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):
                name = os.readlink(handle)
                if folder in name and name.endswith(".tar"):
                    return True
    return False
