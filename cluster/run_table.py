"""The runs of a storage folder: what they are, how far they have come, and in what they differ."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cluster.lock import Held, Lock
from cluster.runfolder import RunFolder, flat, read_lines

MEASURES = {"loss": "train/loss", "images_per_s": "train/images_per_s", "wait_share": "train/wait_share"}


@dataclass(frozen=True, slots=True)
class Row:
    """One run. status: FINISHED, FAILED, KILLED, RUNNING, or UNFINISHED: without a result, its driver was killed or still runs.

    before, after: recall@1 of the first and of the last evaluation.
    """

    name: str
    path: str
    status: str
    steps: int
    before: float | None
    after: float | None
    wall_s: float | None
    model: str | None  # in the registry
    age_s: float  # since something was written

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def runs_in(storage: Path) -> list[RunFolder]:
    """All of them, the oldest first. Raises ValueError when `storage` is no folder."""
    if not storage.is_dir():
        raise ValueError(f"no folder {storage}; name the storage folder of your runs")
    found = [RunFolder(path) for path in storage.iterdir() if path.is_dir() and RunFolder(path).exists()]
    return sorted(found, key=last_written)


def row(run: RunFolder) -> Row:
    result = run.result() or {}
    lines = list(read_lines(run.metrics))
    recalls = [line["val/recall_at_1"] for line in lines if "val/recall_at_1" in line]
    version = result.get("model_version")
    return Row(
        name=run.path.name,
        path=str(run.path),
        status=status(run),
        steps=max((int(line["step"]) for line in lines), default=0),
        before=recalls[0] if recalls else None,
        after=recalls[-1] if recalls else None,
        wall_s=result.get("wall_s"),
        model=None if version is None else f"{result['model'].removeprefix('models:/').split('@')[0].split('/')[0]}/{version}",
        age_s=max(0.0, time.time() - last_written(run)),
    )


def status(run: RunFolder) -> str:
    """How it ended; RUNNING while the driver sends its metrics to MLflow."""
    if is_held(run):
        return "RUNNING"
    result = run.result()
    return "UNFINISHED" if result is None else str(result["status"])


def is_held(run: RunFolder) -> bool:
    """Whether a driver, or a sync, has the run in its hands."""
    if not run.tracking_lock.exists():
        return False
    lock = Lock(run.tracking_lock)
    try:
        lock.take()
    except Held:
        return True
    lock.release()
    return False


def last_written(run: RunFolder) -> float:
    """Seconds since 1970."""
    files = (run.result_file, run.metrics, run.attempts, run.config_file)
    return max(path.stat().st_mtime for path in files if path.exists())


def find(name: str, storage: Path) -> RunFolder:
    """A run by its folder, or by its name in `storage`. Raises ValueError when there is none."""
    for path in (Path(name).expanduser().absolute(), storage / name):
        if RunFolder(path).exists():
            return RunFolder(path)
    raise ValueError(f"{name} is no run's folder, and there is no run of this name in {storage}")


def measured(run: RunFolder) -> dict[str, float]:
    """The last evaluation, and the last of what training measures of itself."""
    lines = list(read_lines(run.metrics))
    evaluated = next(
        ({k[4:]: v for k, v in line.items() if k.startswith("val/")} for line in reversed(lines) if _has(line)), {}
    )
    trained = {name: next((line[key] for line in reversed(lines) if key in line), None) for name, key in MEASURES.items()}
    of_run = {"steps": row(run).steps, "wall_s": (run.result() or {}).get("wall_s")}
    return {name: value for name, value in {**evaluated, **trained, **of_run}.items() if value is not None}


def _has(line: Mapping[str, Any]) -> bool:
    return any(key.startswith("val/") for key in line)


def differing(runs: Sequence[RunFolder]) -> dict[str, list[Any]]:
    """Settings that are not the same in all runs, with the value of each; None where a run does not have it."""
    settings = [flat(run.config().model_dump(mode="json", by_alias=True)) for run in runs]
    names = dict.fromkeys(name for one in settings for name in one)
    found = {name: [one.get(name) for one in settings] for name in names if name != "name"}
    return {name: values for name, values in found.items() if any(value != values[0] for value in values)}


def lined_up(rows: Sequence[Sequence[str]]) -> str:
    """Columns, the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(_cells(line, widths)).rstrip() for line in rows)


def _cells(line: Sequence[str], widths: Sequence[int]) -> Iterator[str]:
    for place, (cell, width) in enumerate(zip(line, widths, strict=True)):
        yield cell.ljust(width) if place == 0 else cell.rjust(width)
