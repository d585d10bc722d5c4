"""Sends what MLflow missed of a run that has ended, however it ended."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cluster.description import Description
from cluster.lock import Held, Lock
from cluster.progress import Report
from cluster.runfolder import RunFolder
from cluster.sender import IMPATIENT, Sender, Status
from cluster.store import HIDDEN, brief, environment, redact, tracking_uri
from configs.schema import Tracking


@dataclass(frozen=True, slots=True)
class Synced:
    """What a sync did: rows of metrics that were `sent` and that are still `waiting`; `error` is None when all arrived."""

    run: str
    tracking_uri: str
    mlflow_run_id: str | None
    status: Status
    sent: int
    waiting: int
    error: str | None = None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def describe(self) -> str:
        """For a person."""
        if self.error is not None:
            waits = f"{self.waiting} rows of metrics wait in {self.run}" if self.waiting else "its metrics have arrived"
            return f"MLflow at {self.tracking_uri} has not got everything: {self.error}; {waits}; the same command goes on"
        return f"{self.sent} rows sent; MLflow at {self.tracking_uri} has all of run {self.mlflow_run_id}, {self.status}"


def sync(run: Path, *, uri: str | None = None, progress: Report) -> Synced:
    """Bring the MLflow run to what RUN holds: metrics, params, tags, data sets, final status, artifacts.

    uri: another address for this time. `progress` gets rows done and their total.
    Raises ValueError for what is no run, is not tracked, or is still being trained.
    """
    folder = RunFolder.existing(run)
    config = folder.config()
    if not config.tracking.enabled:
        raise ValueError(f"run {config.name!r} is not tracked: tracking.enabled is false in {run / 'config.yaml'}")
    about = Description.read(folder.description)
    address = _address(config.tracking, about, folder, uri)
    lock = Lock(folder.tracking_lock)
    try:
        lock.take()
    except Held as error:
        raise ValueError(
            f"run {config.name!r} is being trained or synced by {error.holder}, which sends its metrics; "
            "sync it when that has ended"
        ) from error
    try:
        with environment(IMPATIENT):
            return _deliver(folder, Sender(run, config, about, uri=address), progress)
    finally:
        lock.release()


def _deliver(folder: RunFolder, sender: Sender, progress: Report) -> Synced:
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    status, ended = _ending(folder)
    total, sent, error = 0, 0, None

    def told(rows: int) -> None:
        nonlocal sent
        sent += rows
        progress(sent, total)

    try:
        sender.open(running=False)
        total = sender.waiting()  # after `open`: all of them where the run had to be made
        sender.send(told)
        _note(folder, sender)
        sender.close(status, ended=ended)
    except (MlflowException, SQLAlchemyError, OSError) as failure:
        error = brief(failure)
    return Synced(str(folder.path), redact(sender.uri), sender.run_id, status, sent, sender.waiting(), error)


def _address(tracking: Tracking, about: Description, folder: RunFolder, given: str | None) -> str:
    """`given`, else what training would take now, else what it took from its environment then."""
    chosen = given or tracking.uri or os.environ.get("MLFLOW_TRACKING_URI") or about.server
    if chosen is not None and chosen == about.server and HIDDEN in chosen:
        raise ValueError(f"the password of {about.server} was not kept: give the address with --uri or MLFLOW_TRACKING_URI")
    return tracking_uri(tracking.model_copy(update={"uri": chosen}), folder.path.parent)


def _ending(folder: RunFolder) -> tuple[Status, float]:
    """How the run ended, and when; without a result its driver was killed, soon after it had written last."""
    result = folder.result()
    status: Status = "KILLED" if result is None else result["status"]
    last = next(path for path in (folder.result_file, folder.metrics, folder.config_file) if path.exists())
    return status, last.stat().st_mtime


def _note(folder: RunFolder, sender: Sender) -> None:
    """Name the MLflow run in the result of a training that had none when it ended."""
    result = folder.result()
    if result is not None and "mlflow_run_id" in result and result["mlflow_run_id"] != sender.run_id:
        folder.write_result({**result, "mlflow_run_id": sender.run_id, "tracking_uri": redact(sender.uri)})
