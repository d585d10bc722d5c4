"""Ranks as processes of this machine: all of them work, or all are ended and one reason is given."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing import resource_tracker
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from tempfile import TemporaryDirectory

from cluster.runfolder import write_atomically

PATIENCE_S = 5.0  # for the others to end by themselves once one has failed
POLL_S = 0.5  # signals are answered between polls


class RankFailed(RuntimeError):
    """A rank ended without success; `killed`: by a signal, so that it could not say why."""

    def __init__(self, message: str, *, killed: bool) -> None:
        super().__init__(message)
        self.killed = killed


def run_ranks(world: int, work: Callable[[int, Path], None], *, timeout_s: float = float("inf")) -> None:
    """Call `work(rank, folder)`, which is pickled, in `world` new processes; `folder` is empty and theirs to meet in.

    timeout_s: how long after the first has succeeded the others may take.
    Raises RankFailed for the rank that was the cause. Whatever happens, no rank is left.
    """
    with TemporaryDirectory(prefix="nearfar-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        context = multiprocessing.get_context("spawn")
        ranks = [context.Process(target=_run, args=(rank, folder, work), name=f"rank {rank}") for rank in range(world)]
        resource_tracker.ensure_running()  # its start would let the signal in again
        try:
            with _unheard(signal.SIGINT):  # Ctrl-C reaches all processes of a terminal, and is for the driver alone
                for rank in ranks:
                    rank.start()
            if not _all_succeed(ranks, timeout_s):
                _await(ranks, PATIENCE_S)
                raise _cause(ranks, folder)
        finally:
            for rank in ranks:
                if rank.pid is not None:
                    rank.kill()
                    rank.join()


def _run(rank: int, folder: Path, work: Callable[[int, Path], None]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        work(rank, folder)
    except Exception as error:
        if os.environ.get("NEARFAR_DEBUG"):
            traceback.print_exc()
        with suppress(OSError):  # of a full disk
            write_atomically(_word(folder, rank), f"{type(error).__name__}: {error}")
        sys.stderr.flush()
        os._exit(1)  # at once, which closes all connections: an orderly end can wait for ranks that stand still


def _all_succeed(ranks: Sequence[BaseProcess], timeout_s: float) -> bool:
    """Waits until that is known. One that is stopped when its work is done would be waited for in vain."""
    deadline = float("inf")
    while running := [process for process in ranks if process.exitcode is None]:
        if any(process.exitcode for process in ranks) or time.monotonic() > deadline:
            return False
        if len(running) < len(ranks):
            deadline = min(deadline, time.monotonic() + timeout_s)
        wait([process.sentinel for process in running], timeout=POLL_S)
    return not any(process.exitcode for process in ranks)


def _await(ranks: Sequence[BaseProcess], timeout_s: float) -> None:
    """Those that fail because one is gone end by themselves, mostly."""
    deadline = time.monotonic() + timeout_s
    for process in ranks:
        process.join(max(0.0, deadline - time.monotonic()))


def _cause(ranks: Sequence[BaseProcess], folder: Path) -> RankFailed:
    """One that was killed says nothing, and the others fail for its sake; else the first that said why."""
    for number, process in enumerate(ranks):
        if process.exitcode is not None and process.exitcode < 0:
            name = signal.Signals(-process.exitcode).name
            hint = "; the system does so too when memory runs out" if name == "SIGKILL" else ""
            return RankFailed(f"rank {number} was killed by {name}{hint}", killed=True)
    words = [(_word(folder, number), number) for number in range(len(ranks))]
    said = sorted((path.stat().st_mtime_ns, number, path) for path, number in words if path.exists())
    if said:
        _, number, path = said[0]
        return RankFailed(f"rank {number}: {path.read_text(encoding='utf-8')}", killed=False)
    late = [number for number, process in enumerate(ranks) if process.exitcode is None]
    if late:
        return RankFailed(f"rank {late[0]} hung: others have long ended", killed=True)
    codes = {number: process.exitcode for number, process in enumerate(ranks) if process.exitcode}
    return RankFailed(f"ranks ended with exit codes {codes}", killed=False)


def _word(folder: Path, rank: int) -> Path:
    return folder / f"error-{rank}"


@contextmanager
def _unheard(number: int) -> Iterator[None]:
    """Block a signal in this thread and in the processes started meanwhile; here it is heard afterwards."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {number})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
