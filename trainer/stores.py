"""Where checkpoints lie: a folder, or a place behind a URL that fsspec opens (`s3://`, `gs://`, `memory://`, ...)."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import fsspec.core

MANIFEST = "state.json"  # of a checkpoint: whoever sees it sees all the files it names
TRIES = 3
PAUSE_S = 0.5  # before the second try, twice that before the third
_NAME = re.compile(r"step-(\d{8,})")
T = TypeVar("T")


class Store(Protocol):
    """Checkpoints as named sets of files, there whole or not at all. Picklable. What fails is an OSError."""

    @property
    def location(self) -> str:
        """Folder or URL, for messages."""

    def names(self) -> list[str]:
        """Of all sets, newest first; one that a killed writer left in the middle may be among them, without its MANIFEST."""

    def publish(self, name: str) -> AbstractContextManager[Path]:
        """An empty local folder to write to; once left without an error, its files are the set `name`."""

    def fetched(self, name: str, file: str) -> AbstractContextManager[Path]:
        """One file as a local one. Raises FileNotFoundError when there is none."""

    def remove(self, name: str) -> None:
        """Drop a set; never leaves its MANIFEST without its files."""

    def collect(self) -> None:
        """Drop what killed writers left. Nobody may be writing."""


def name_of(step: int) -> str:
    """Of the checkpoint after optimizer step `step`."""
    return f"step-{step:08d}"


def step_of(name: str) -> int:
    """The reverse of `name_of`."""
    return int(name.removeprefix("step-"))


def open_store(location: str | Path) -> Store:
    """A store below a folder or a URL; neither has to exist yet."""
    return UrlStore(str(location).rstrip("/")) if "://" in str(location) else FolderStore(Path(location))


@dataclass(frozen=True, slots=True)
class FolderStore:
    """Written beside under a hidden name, then renamed."""

    folder: Path

    @property
    def location(self) -> str:
        return str(self.folder)

    def names(self) -> list[str]:
        return _ordered(path.name for path in self.folder.glob("step-*"))

    @contextmanager
    def publish(self, name: str) -> Iterator[Path]:
        temporary = self.folder / f".{name}.{os.getpid()}"
        try:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            yield temporary
            for path in [*temporary.iterdir(), temporary]:
                _flush(path)  # older checkpoints are dropped next: this one has to outlive a power cut by then
            self.remove(name)
            temporary.rename(self.folder / name)
            _flush(self.folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    @contextmanager
    def fetched(self, name: str, file: str) -> Iterator[Path]:
        path = self.folder / name / file
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing")
        yield path

    def remove(self, name: str) -> None:
        (self.folder / name / MANIFEST).unlink(missing_ok=True)
        shutil.rmtree(self.folder / name, ignore_errors=True)

    def collect(self) -> None:
        for path in self.folder.glob(".step-*"):
            shutil.rmtree(path, ignore_errors=True)


@dataclass(frozen=True, slots=True)
class UrlStore:
    """Written to a local temporary folder, then sent, MANIFEST last: object stores cannot rename."""

    location: str

    def names(self) -> list[str]:
        def ask(fs: Any, root: str) -> list[str]:
            fs.invalidate_cache()
            with suppress(FileNotFoundError):
                return [path.rstrip("/").rpartition("/")[2] for path in fs.ls(root, detail=False)]
            return []

        return _ordered(self._asked(ask))

    @contextmanager
    def publish(self, name: str) -> Iterator[Path]:
        with tempfile.TemporaryDirectory(prefix="nearfar-checkpoint-") as folder:
            yield Path(folder)
            self.remove(name)
            for path in sorted(Path(folder).iterdir(), key=lambda path: path.name == MANIFEST):
                self._send(path, f"{name}/{path.name}")

    @contextmanager
    def fetched(self, name: str, file: str) -> Iterator[Path]:
        with tempfile.TemporaryDirectory(prefix="nearfar-checkpoint-") as folder:
            path = Path(folder) / file
            self._asked(lambda fs, root: fs.get_file(f"{root}/{name}/{file}", str(path)))
            yield path

    def remove(self, name: str) -> None:
        def drop(fs: Any, root: str) -> None:
            for path in (f"{root}/{name}/{MANIFEST}", f"{root}/{name}"):
                with suppress(FileNotFoundError):
                    fs.rm(path, recursive=True)

        self._asked(drop)

    def collect(self) -> None:
        for name in self.names():
            if not self._holds(f"{name}/{MANIFEST}"):
                self.remove(name)

    def _holds(self, name: str) -> bool:
        return self._asked(lambda fs, root: bool(fs.exists(f"{root}/{name}")))

    def _send(self, path: Path, name: str) -> None:
        def put(fs: Any, root: str) -> None:
            fs.makedirs(f"{root}/{name}".rpartition("/")[0], exist_ok=True)
            fs.put_file(str(path), f"{root}/{name}")

        self._asked(put)

    def _asked(self, question: Callable[[Any, str], T]) -> T:
        for attempt in range(TRIES):
            try:
                fs, root = fsspec.core.url_to_fs(self.location, skip_instance_cache=attempt > 0)  # again: a new connection
                return question(fs, root.rstrip("/"))
            except FileNotFoundError:  # an answer too
                raise
            except (ImportError, ValueError) as error:
                raise ValueError(f"{self.location} cannot be opened: {error}") from error
            except Exception as error:  # every file system has its own kinds
                if attempt == TRIES - 1:
                    raise OSError(f"{self.location}: {TRIES} tries failed: {type(error).__name__}: {error}") from error
                time.sleep(PAUSE_S * 2**attempt)
        raise AssertionError("unreachable")


def _ordered(names: Iterable[str]) -> list[str]:
    return sorted(filter(_NAME.fullmatch, names), key=step_of, reverse=True)


def _flush(path: Path) -> None:
    """Until it is on the disk itself."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
