"""Follows a job's log to its end, over lost connections, and tells how it ended."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cluster.jobs import client as server
from cluster.jobs.client import ENDED
from cluster.run import JobFailed

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

PATIENCE_S = 60.0  # how long a server may be gone before following it ends
STOPPED = 143  # exit code of a job that was told to stop, as a shell has it for SIGTERM


@dataclass(frozen=True, slots=True)
class Ending:
    """How a job ended: Ray's status, the exit code of its driver, and its own last word on what was wrong."""

    status: str
    exit_code: int
    error: str | None


def follow(client: JobSubmissionClient, id: str, write: Callable[[str], None]) -> Ending:
    """Write a job's log, from its beginning, until it ends. Raises JobFailed when the cluster is gone for a minute."""
    shown, lost = 0, None

    def show(text: str) -> None:
        nonlocal shown
        shown += len(text)
        write(text)

    while True:
        try:
            asyncio.run(_tail(client, id, show, shown))
            if str(client.get_job_status(id).value) in ENDED:
                text = client.get_job_logs(id)
                show(text[shown:])
                return ending_of(client, id, text)
            lost = None
        except Exception as error:  # of whatever sort: the network, the server, the websocket
            lost = lost or time.monotonic()
            if time.monotonic() - lost > PATIENCE_S:
                raise JobFailed(f"{server.explain(client.get_address(), error)}; the job may be running still") from error
        time.sleep(1)


def ending_of(client: JobSubmissionClient, id: str, log: str) -> Ending:
    """Of a job that has ended."""
    info = client.get_job_info(id)
    status = str(info.status.value)
    if status == "SUCCEEDED":
        return Ending(status, 0, None)
    if status == "STOPPED":
        return Ending(status, STOPPED, None)
    code = info.driver_exit_code or 1
    told = _error(log) or _error(info.message or "") or "it left no word"
    return Ending(status, code if code > 0 else 128 - code, told)  # killed by a signal: as a shell has it


def _error(log: str) -> str | None:
    """The last message of nearfar's own in the log, else its last line."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    own = [line.removeprefix("nearfar: ") for line in lines if line.startswith("nearfar: ")]
    return (own or lines or [None])[-1]  # type: ignore[list-item]


async def _tail(client: JobSubmissionClient, id: str, show: Callable[[str], None], shown: int) -> None:
    """Show what comes after the first `shown` characters, as long as the connection lasts."""
    seen = 0
    async for text in client.tail_job_logs(id):
        fresh = text[max(0, shown - seen) :]
        seen += len(text)
        if fresh:
            show(fresh)


def stop(client: JobSubmissionClient, id: str, *, timeout_s: float) -> str:
    """Ask a job to stop and wait until it has; returns its status, which is not an end when it takes longer."""
    client.stop_job(id)
    deadline = time.monotonic() + timeout_s
    while (status := str(client.get_job_status(id).value)) not in ENDED and time.monotonic() < deadline:
        time.sleep(0.5)
    return status
