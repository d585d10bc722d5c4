"""What the driver hands to every rank, and the files through which they tell each other that it is over."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from cluster import attempts
from cluster.runfolder import write_atomically
from cluster.versions import installed
from configs.errors import Unrecoverable
from configs.schema import RunConfig
from pipelines.growth import History


@dataclass(frozen=True, slots=True)
class Job:
    """What the driver hands to every rank: picklable, all paths absolute."""

    config: RunConfig
    run: Path
    steps: int
    histories: tuple[History, ...]  # of the data: every worker and every restart reads what the driver saw
    launch_id: str  # one per start of the driver; restarts of the workers share it
    profile: int = 0  # how many steps to profile
    versions: Mapping[str, str] = field(default_factory=installed)  # of what decides the numbers, where the driver runs

    @property
    def request(self) -> Path:
        """The driver writes this file to ask the ranks to stop."""
        return self.run / f".request-{self.launch_id}"

    @property
    def stopped(self) -> Path:
        """The ranks leave word here when they have."""
        return self.run / f".stopped-{self.launch_id}"


def stop(job: Job, reason: str) -> Unrecoverable:
    """The error, with its reason left for the driver and for ranks that are started again."""
    attempts.ended(job.run, reason, sure=True)
    for file in _stop_files(job):
        with suppress(OSError):
            write_atomically(file, reason)
            break
    return Unrecoverable(reason)


def refuse_useless(job: Job) -> None:
    """Raise Unrecoverable when a rank of this launch has left a reason."""
    for file in _stop_files(job):
        if file.exists():
            raise Unrecoverable(file.read_text(encoding="utf-8"))


def forget(job: Job) -> None:
    """Remove what a launch leaves for its own restarts only."""
    for file in (*_stop_files(job), job.request, job.stopped):
        file.unlink(missing_ok=True)


def _stop_files(job: Job) -> list[Path]:
    """Where the reason may be: with the run, or, when that disk is full, with this machine's temporary files."""
    return [job.run / f".stop-{job.launch_id}", Path(tempfile.gettempdir()) / f"nearfar-stop-{job.launch_id}"]
