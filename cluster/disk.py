"""Whether a run can write where its config wants it to."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import fsspec

from configs.schema import RunConfig


def check_places(config: RunConfig, parameters: int) -> None:
    """Raises ValueError for a place where nothing can be written, RuntimeError when too little of the disk is free."""
    _writable("cluster.storage", Path(config.cluster.storage))
    place = config.cluster.checkpoints or config.cluster.storage
    if "://" in place:
        _known_scheme("cluster.checkpoints", place)
        return
    key = "cluster.checkpoints" if config.cluster.checkpoints else "cluster.storage"
    folder = _writable(key, Path(place))
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


def _writable(key: str, folder: Path) -> Path:
    """The nearest folder that exists at or above `folder`, once something could be made in it."""
    folder = folder.expanduser().absolute()
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir():
        raise ValueError(f"{key}: {folder} is a file, not a folder; name another place")
    try:
        with tempfile.TemporaryDirectory(prefix=".nearfar-", dir=folder):
            return folder
    except OSError as error:
        raise ValueError(f"{key}: nothing can be written in {folder} ({error.strerror}); name another place") from error


def _known_scheme(key: str, url: str) -> None:
    try:
        fsspec.get_filesystem_class(url.partition("://")[0])
    except (ValueError, ImportError) as error:
        raise ValueError(f"{key}: {url} cannot be opened: {error}") from error
