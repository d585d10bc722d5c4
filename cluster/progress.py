"""Progress on stderr: a bar on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from cluster import profile_table
from cluster.runfolder import RunFolder

Report = Callable[[int, "int | None"], None]
EVERY_S = 10.0  # between two plain lines

err = Console(stderr=True, highlight=False, soft_wrap=True)


def say(text: str) -> None:
    """One line for a person, on stderr."""
    err.print(text, markup=False)


@contextmanager
def bar(label: str, unit: str = "") -> Iterator[Callable[..., None]]:
    """Yields `report(done, total=None, note="")`. Speed and time left are told too, counted from the first report on."""
    if not err.is_terminal:
        yield _plain(label, unit)
        return
    columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn(unit), TimeElapsedColumn()]
    columns += [TextColumn("{task.fields[pace]}"), TextColumn("{task.fields[note]}")]
    with Progress(*columns, console=err) as shown:
        task, pace = shown.add_task(label, total=None, pace="", note=""), _Pace(unit)

        def report(done: int, total: int | None = None, note: str = "") -> None:
            shown.update(task, completed=done, total=total, pace=pace(done, total), note=note)

        yield report


class _Pace:
    """How fast it goes and how long it takes. What was done before the first report says nothing about either."""

    def __init__(self, unit: str) -> None:
        self._unit = unit
        self._began: tuple[float, int] | None = None

    def __call__(self, done: int, total: int | None) -> str:
        now = time.monotonic()
        if self._began is None or done < self._began[1]:
            self._began = now, done
        rate = (done - self._began[1]) / max(now - self._began[0], 1e-3)
        if not rate:
            return ""
        speed = f"{rate:.{0 if rate >= 10 else 1}f} {self._unit}/s".replace(" /", "/")
        return speed if total is None or done >= total else f"{speed}, {timedelta(seconds=round((total - done) / rate))} left"


def _plain(label: str, unit: str) -> Callable[..., None]:
    last = [time.monotonic() - EVERY_S]
    pace = _Pace(unit)

    def report(done: int, total: int | None = None, note: str = "") -> None:
        speed = pace(done, total)
        if done == total or time.monotonic() - last[0] >= EVERY_S:
            last[0] = time.monotonic()
            of = f"/{total}" if total is not None else ""
            print(" ".join(filter(None, [f"{label}: {done}{of}", unit, speed, note])), file=sys.stderr, flush=True)

    return report


@contextmanager
def following(folder: RunFolder, steps: int) -> Iterator[None]:
    """Shows a run's steps, loss and recall as its metrics.jsonl grows, its weights' hashes, its profile, starts of workers."""
    done = threading.Event()
    with bar("training", "steps") as report:
        thread = threading.Thread(target=_follow, args=(folder, steps, report, done), daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join(2)


def _follow(folder: RunFolder, steps: int, report: Callable[..., None], done: threading.Event) -> None:
    seen = {"loss": "", "recall": ""}
    table = folder.profile / profile_table.FILE
    before = _written(table)
    numbers, weights, starts = Tail(folder.metrics), Tail(folder.hashes), Tail(folder.attempts, new_only=True)
    while True:
        ending = done.wait(0.5)
        if _written(table) != before:
            before = _written(table)
            say(profile_table.describe(profile_table.read(folder.profile)))
        for row in numbers.read():
            if "train/loss" in row:
                seen["loss"] = f"loss {row['train/loss']:.3f} · {row.get('train/images_per_s', 0):.0f} images/s"
            if "val/recall_at_1" in row:
                seen["recall"] = f"recall@1 {row['val/recall_at_1']:.3f}"
            report(row["step"], steps, " · ".join(filter(None, seen.values())))
        for row in weights.read():
            say(f"step {row['step']}: weights {row['weights']}")
        for row in starts.read():
            if row["world"] > 1:
                say(f"nodes: {row['nodes']}")
            for oddity in row["oddities"]:
                say(f"note: {oddity}")
            if (ended := row["last_ended"]) is not None:
                say(f"{row['world']} workers go on from step {row['from_step']}; the attempt before ended: {ended}")
        if ending:
            return


def _written(path: Path) -> int | None:
    """When, if it is there."""
    return path.stat().st_mtime_ns if path.exists() else None


class Tail:
    """The objects of a JSONL file, each once."""

    def __init__(self, path: Path, *, new_only: bool = False) -> None:
        self._path = path
        self._offset = path.stat().st_size if new_only and path.exists() else 0

    def read(self) -> Iterator[dict[str, Any]]:
        """Those added since the last call; a line that is not whole yet waits for the next."""
        if not self._path.exists():
            return
        with self._path.open("rb") as file:
            file.seek(self._offset)
            for line in file:
                if not line.endswith(b"\n"):
                    return
                self._offset += len(line)
                yield json.loads(line)
