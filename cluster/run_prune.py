"""Frees the disk of what runs no longer need, and of nothing that cannot be had again."""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cluster.lock import Held, Lock
from cluster.run_table import is_held, last_written
from cluster.runfolder import RunFolder
from cluster.sender import IMPATIENT
from cluster.store import environment, fluent, open_client, tracking_uri
from trainer import checkpoints
from trainer.export import SETTINGS
from trainer.stores import step_of

DAY_S = 86400.0


@dataclass(frozen=True, slots=True)
class Freed:
    """Of one run: checkpoints and folders that go, or went, and their bytes (0 for checkpoints behind a URL)."""

    run: str
    checkpoints: tuple[str, ...]
    folders: tuple[str, ...]
    nbytes: int
    why: str  # that they go, and what stays

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def chosen(runs: Sequence[RunFolder], *, keep: int | None, older_than: float | None) -> list[RunFolder]:
    """Runs (oldest first) but for the newest `keep`, and only those that nothing was written to for `older_than` days."""
    old = list(runs[: max(0, len(runs) - keep)] if keep is not None else runs)
    return [run for run in old if older_than is None or time.time() - last_written(run) > older_than * DAY_S]


def plan(run: RunFolder) -> Freed:
    """What may go.

    Of a finished run all checkpoints, and its export if the registry has the model. Of one that broke off all checkpoints
    but the newest complete one, from which --resume goes on. Nothing of one that is running, or may be.
    """
    result = run.result()
    if is_held(run):
        return _nothing(run, "running")
    if result is None and not run.config().tracking.enabled:
        return _nothing(run, "has no result: it may be running")
    store = run.checkpoints(run.config())
    names = store.names()
    if result is None or result["status"] != "FINISHED":
        newest = checkpoints.newest(store)
        if newest is None:
            return _nothing(run, "unfinished, and no checkpoint is complete")
        gone = tuple(name for name in names if step_of(name) < newest.step)
        return Freed(str(run.path), gone, (), _size(run, gone, ()), f"unfinished: {newest.name} stays")
    kept = _holds(run, result)
    exported = (run.export / SETTINGS).is_file()
    if not kept and not exported:
        return _nothing(run, "finished, but neither exported nor registered: its checkpoint is its only model")
    folders = (run.export.name,) if kept and exported else ()
    why = "finished; the registry has its model" if kept else "finished; its export stays, which is its only model"
    return Freed(str(run.path), tuple(names), folders, _size(run, names, folders), why)


def carry_out(planned: Freed) -> bool:
    """Remove it; False when the run has been taken up in the meantime."""
    run = RunFolder(Path(planned.run))
    lock = Lock(run.tracking_lock)
    try:
        lock.take()
    except Held:
        return False
    try:
        store = run.checkpoints(run.config())
        for name in planned.checkpoints:
            store.remove(name)
        for folder in planned.folders:
            shutil.rmtree(run.path / folder)
    finally:
        lock.release()
    return True


def _nothing(run: RunFolder, why: str) -> Freed:
    return Freed(str(run.path), (), (), 0, why)


def _holds(run: RunFolder, result: dict[str, Any]) -> bool:
    """Whether the registry has this run's model, and its files: asked now, since versions can be deleted."""
    version, name = result.get("model_version"), run.config().tracking.register_as
    if version is None or name is None:
        return False
    uri = tracking_uri(run.config().tracking, run.path.parent)
    if uri.startswith("sqlite:///") and not Path(uri.removeprefix("sqlite:///")).exists():
        return False
    from mlflow.artifacts import list_artifacts
    from mlflow.exceptions import MlflowException

    try:
        with environment(IMPATIENT), fluent(uri):
            found = open_client(uri).get_model_version(name, version)
            files = list_artifacts(f"models:/{name}/{version}")
        return found.run_id == result["mlflow_run_id"] and any(file.path.endswith("MLmodel") for file in files)
    except (MlflowException, OSError):
        return False


def _size(run: RunFolder, names: Sequence[str], folders: Sequence[str]) -> int:
    places = [*(run.path / "checkpoints" / name for name in names), *(run.path / folder for folder in folders)]
    return sum(file.stat().st_size for place in places for file in place.rglob("*") if file.is_file())
