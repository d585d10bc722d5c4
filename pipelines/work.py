"""The folder OUT.partial, in which long work can be stopped at any time and taken up again."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from configs.errors import Unrecoverable
from pipelines.folders import explain_full, is_full, make_folder, require_free, sync

PLAN = "plan.json"
LOCK = "lock"
VERSION = 1


class Discard(ValueError):
    """The source is of no use: what was made of it is removed."""


def partial_folder(out: Path) -> Path:
    return out.with_name(f"{out.name}.partial")


@contextmanager
def work_folder(out: Path, plan: Mapping[str, object], *, needed_bytes: int = 0) -> Iterator[Path]:
    """OUT.partial, locked, new or left behind by an earlier call with the same `plan` (option -> JSON value).

    It stays whatever happens, except after Discard; when all is done, `publish` what is in it.
    Raises ValueError when another process works in it, when it was begun with another plan, or when OUT is taken;
    RuntimeError when the disk is full.
    """
    folder = partial_folder(out)
    make_folder(folder, exist_ok=True)
    with _locked(folder):
        _require_plan(folder, out, {"version": VERSION, **plan})
        try:
            yield folder
        except Discard:
            shutil.rmtree(folder)
            raise
        except Unrecoverable:
            raise
        except (RuntimeError, OSError) as error:
            if isinstance(error, OSError) and not is_full(error):
                raise
            told = explain_full(out, needed_bytes) if isinstance(error, OSError) else error
            raise RuntimeError(f"{told}; what is done is kept, the same command goes on in {str(folder)!r}") from error


def publish(made: Path, out: Path) -> None:
    """Rename the folder `made`, inside OUT.partial, to OUT, and remove the rest."""
    os.replace(made, out)
    sync(out.absolute().parent)
    shutil.rmtree(made.parent)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """The lock ends with the process that holds it, however it ends."""
    busy = f"another process is at work in {str(folder)!r}: wait for it, or give another OUT"
    with (folder / LOCK).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            same = os.path.samestat(os.fstat(file.fileno()), os.stat(folder / LOCK))
        except (BlockingIOError, FileNotFoundError):
            raise ValueError(busy) from None
        if not same:
            raise ValueError(busy)
        yield


def _require_plan(folder: Path, out: Path, plan: Mapping[str, object]) -> None:
    path = folder / PLAN
    if not path.is_file():
        if {entry.name for entry in folder.iterdir()} - {LOCK}:
            raise ValueError(f"{str(folder)!r} exists and holds no unfinished work: remove it or give another OUT")
        try:
            require_free(out)  # another process may have finished since the last look
        except ValueError:
            shutil.rmtree(folder)
            raise
        write_json(path, plan)
        return
    begun = read_json(path)
    changed = [name for name in plan if begun.get(name) != plan[name]]
    if changed:
        told = "; ".join(f"{name}: {begun.get(name)} then, {plan[name]} now" for name in changed if name != "source")
        what = f"with other options ({told})" if told else "before the source changed"
        raise ValueError(f"{str(folder)!r} was begun {what}: remove it to start anew, or give what was given then")


def write_json(path: Path, value: object) -> None:
    """All of it or nothing, and through to the disk."""
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    with temporary.open("w", encoding="utf-8") as file:
        json.dump(value, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def read_json(path: Path) -> Any:
    return json.loads(path.read_text("utf-8"))
