"""Checkpoints: written beside, checked, then published, so that what is there is whole.

    checkpoints/step-00000200/  encoder.safetensors  average.safetensors  objective.safetensors  optimizer.pt
                                random.safetensors  state.json

`state.json` is written last and holds a checksum of every other file.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from configs.errors import Unrecoverable, is_full
from configs.evaluation import goodness
from trainer.retention import superfluous
from trainer.stores import MANIFEST, Store, name_of, open_store, step_of

VERSION = 2
READABLE = (1, 2)  # version 1 had no random.safetensors, no metric and no checksum of state.json itself
logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class About:
    """What a checkpoint says of itself."""

    step: int
    position: int
    identity: Mapping[str, Any]  # the settings that decide what a run computes
    sources: Sequence[Mapping[str, Any]] = ()  # the data that the stream was made of
    metric: Mapping[str, float] = field(default_factory=dict)  # what was evaluated at this very step

    @property
    def name(self) -> str:
        return name_of(self.step)


@dataclass(frozen=True, slots=True)
class Saved(About):
    """A checkpoint that is there. Picklable."""

    store: Store = field(kw_only=True)
    files: Mapping[str, str] = field(kw_only=True)  # name -> sha256

    @property
    def location(self) -> str:
        return f"{self.store.location}/{self.name}"


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What a checkpoint holds of the training."""

    modules: Mapping[str, Mapping[str, Tensor]]
    optimizer: Mapping[str, Any]
    random: Mapping[str, Tensor]


def save(store: Store | Path, taken: Snapshot, about: About, *, keep: int, best_by: str | None = None) -> None:
    """Write one checkpoint; drop all but the newest `keep` and the one with the best metric `best_by`. One rank calls it.

    Raises Unrecoverable when the disk is full, RuntimeError when the store fails; the checkpoints that were there stay.
    """
    store = _opened(store)
    where = f"{store.location}/{about.name}"
    try:
        with store.publish(about.name) as folder:
            _write(folder, taken, about)
    except (OSError, RuntimeError, SafetensorError) as error:
        cause = _cause(error)
        full = os.strerror(errno.ENOSPC) if _is_full(cause) else None
        told = f"cannot write the checkpoint {where}: {getattr(cause, 'strerror', None) or full or str(cause).splitlines()[0]}"
        if full:
            raise Unrecoverable(f"{told}; free some space; older ones stay") from error
        raise RuntimeError(f"{told}; older ones stay") from error
    try:
        _prune(store, about.step, keep, best_by)
    except (OSError, RuntimeError) as error:
        logger.warning("old checkpoints in %s stay: %s", store.location, error)


def _write(folder: Path, taken: Snapshot, about: About) -> None:
    for name, state in {**taken.modules, "random": taken.random}.items():
        tensors = {key: value.detach().cpu().contiguous() for key, value in state.items()}
        save_file(tensors, folder / f"{name}.safetensors")
    with (folder / "optimizer.pt").open("wb") as file:  # of a file that torch opens itself, no OSError comes back
        torch.save(taken.optimizer, file)
    files = {path.name: _checksum(path) for path in sorted(folder.iterdir())}
    told = {"version": VERSION, "step": about.step, "position": about.position, "identity": about.identity}
    told |= {"sources": list(about.sources), "metric": dict(about.metric), "files": files}
    told = json.loads(json.dumps(told))
    (folder / MANIFEST).write_text(json.dumps({**told, "checksum": _checksum_of(told)}, indent=1))


def _cause(error: BaseException) -> BaseException:
    """What the system said; torch raises something else on top of it."""
    below: BaseException | None = error
    while below is not None and not isinstance(below, OSError):
        below = below.__context__
    return below or error


def _is_full(cause: BaseException) -> bool:
    if isinstance(cause, OSError):
        return is_full(cause)
    return "os error 28" in str(cause) or "os error 122" in str(cause)  # safetensors only cites it


def _prune(store: Store, newest: int, keep: int, best_by: str | None) -> None:
    values: dict[int, float | None] = dict.fromkeys(map(step_of, store.names()))
    if best_by is not None:
        for step in values:
            with suppress(Damaged):
                value = _manifest(store, name_of(step)).get("metric", {}).get(best_by)
                values[step] = None if value is None else goodness(best_by, value)
    for step in superfluous(values, newest, keep=keep):
        store.remove(name_of(step))


@dataclass(frozen=True, slots=True)
class Search:
    """The newest complete checkpoint, and for every newer one why it was passed over."""

    saved: Saved | None
    skipped: tuple[str, ...]


def search(store: Store | Path) -> Search:
    """Look for the newest complete checkpoint. Raises as `read` does, but for Damaged."""
    store = _opened(store)
    skipped: list[str] = []
    for name in store.names():
        try:
            return Search(read(store, name), tuple(skipped))
        except Damaged as error:
            skipped.append(str(error))
    return Search(None, tuple(skipped))


def newest(store: Store | Path) -> Saved | None:
    """The newest complete checkpoint. Raises as `search` does."""
    return search(store).saved


class Damaged(ValueError):
    """A checkpoint that is not whole."""


def read(store: Store | Path, name: str) -> Saved:
    """Check every file of one checkpoint.

    Raises Damaged that says what is wrong with it, ValueError when its version is not known here, RuntimeError when the
    store does not answer.
    """
    store = _opened(store)
    told, where = _manifest(store, name), f"{store.location}/{name}"
    if told["version"] not in READABLE:
        raise ValueError(
            f"{where} is of version {told['version']}, this nearfar reads versions {' and '.join(map(str, READABLE))}: go on "
            "with the nearfar that wrote it, or move it away to go on from the one before"
        )
    about = {key: told[key] for key in ("step", "position", "identity", "files")}
    saved = Saved(**about, sources=told.get("sources", ()), metric=told.get("metric", {}), store=store)
    if saved.name != name:
        raise Damaged(f"{where} holds the checkpoint of another step, {saved.step}")
    for file, expected in saved.files.items():
        with _fetched(store, name, file) as path:
            found = _checksum(path)
        if found != expected:
            raise Damaged(f"{where}: {file} is damaged (its checksum differs)")
    return saved


def _manifest(store: Store, name: str) -> dict[str, Any]:
    """Raises Damaged when it is not what was written."""
    where = f"{store.location}/{name}: {MANIFEST}"
    with _fetched(store, name, MANIFEST) as path:
        data = path.read_bytes()
    try:
        told: dict[str, Any] = dict(json.loads(data))
    except (ValueError, TypeError) as error:
        raise Damaged(f"{where} is damaged ({error})") from error
    expected = told.pop("checksum", None)
    if told.get("version") != 1 and expected != _checksum_of(told):
        raise Damaged(f"{where} is damaged (its checksum differs)")
    return told


@contextmanager
def _fetched(store: Store, name: str, file: str) -> Iterator[Path]:
    where = f"{store.location}/{name}: {file}"
    try:
        with store.fetched(name, file) as path:
            yield path
    except FileNotFoundError as error:
        raise Damaged(f"{where} is missing") from error
    except OSError as error:
        if error.errno == errno.EIO:  # a disk that lost it, not a store that is away
            raise Damaged(f"{where} cannot be read: {error.strerror}") from error
        raise RuntimeError(f"cannot read {where}: {error.strerror or error}") from error


def _opened(store: Store | Path) -> Store:
    return open_store(store) if isinstance(store, Path) else store


def _checksum_of(told: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


def _checksum(path: Path) -> str:
    """sha256 of a file, in hex."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
