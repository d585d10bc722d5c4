"""Whether a run can write where its config wants it to."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import fsspec

from configs.schema import RunConfig


def check_places(config: RunConfig) -> None:
    """Raise ValueError for a place where nothing can be written."""
    _writable("cluster.storage", Path(config.cluster.storage))
    key, place = _checkpoints(config)
    if "://" in place:
        _known_scheme(key, place)
    else:
        _writable(key, Path(place))


def check_space(config: RunConfig, parameters: int) -> None:
    """Raise RuntimeError when less of the disk is free than the checkpoints of so many parameters will take."""
    key, place = _checkpoints(config)
    if "://" in place:
        return
    folder = _nearest(Path(place))
    copies = 4 if config.train.ema else 3
    size = 8 if config.train.precision == "fp64" else 4
    kept = config.train.keep + config.train.keep_best + 1  # and the one that is being written
    needed, free = parameters * size * copies * kept, shutil.disk_usage(folder).free
    if needed > free:
        raise RuntimeError(
            f"{key}: {folder} has {free / 1e9:.1f} GB free, {kept} checkpoints need {needed / 1e9:.1f} GB; free some, lower "
            "train.keep or name another disk"
        )


def check_database(uri: str) -> None:
    """Raise ValueError when `uri` is a sqlite file that cannot be made."""
    if not uri.startswith("sqlite:///"):
        return
    file = Path(uri.removeprefix("sqlite:///"))
    if file.is_dir():
        raise ValueError(f"tracking.uri: {file} is a folder; name a file, for instance sqlite:///{file / 'mlflow.db'}")
    _writable("tracking.uri", file.parent)


def _checkpoints(config: RunConfig) -> tuple[str, str]:
    """The setting that says where checkpoints lie, and what it says."""
    elsewhere = config.cluster.checkpoints
    return ("cluster.storage", config.cluster.storage) if elsewhere is None else ("cluster.checkpoints", elsewhere)


def _nearest(folder: Path) -> Path:
    """What exists of a path: itself, or the lowest of the folders that it is in."""
    folder = folder.expanduser().absolute()
    while not folder.exists():
        folder = folder.parent
    return folder


def _writable(key: str, folder: Path) -> None:
    """Raise ValueError that names `key` unless something can be made in what exists of `folder`."""
    folder = _nearest(folder)
    if not folder.is_dir():
        raise ValueError(f"{key}: {folder} is a file, not a folder; name another place")
    try:
        with tempfile.TemporaryDirectory(prefix=".nearfar-", dir=folder):
            pass
    except OSError as error:
        raise ValueError(f"{key}: nothing can be written in {folder} ({error.strerror}); name another place") from error


def _known_scheme(key: str, url: str) -> None:
    try:
        fsspec.get_filesystem_class(url.partition("://")[0])
    except (ValueError, ImportError) as error:
        raise ValueError(f"{key}: {url} cannot be opened: {error}") from error
