"""What a job takes along: nearfar itself, the config, and the user's own code, in one folder that Ray uploads once."""

from __future__ import annotations

import fnmatch
import os
import shutil
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path

from configs.load import dump_config
from configs.schema import RunConfig
from pipelines.work import write_json

PACKAGES = ("configs", "pipelines", "trainer", "cluster")
EXCLUDES = (
    *(".*", "__pycache__", "*.pyc", "*.egg-info", "node_modules", "runs", "demo", "shards", "mlruns", "mlartifacts"),
    *("*.tar", "*.parquet", "*.safetensors", "*.pt", "*.onnx", "*.db", "*.log"),
)
MOST_BYTES = 100 * 2**20  # what Ray takes at most
CONFIG, REQUIREMENTS = "nearfar-job.yaml", "nearfar-requirements.json"


def stage(config: RunConfig, into: Path, *, code: Path | None = None, excludes: tuple[str, ...] = ()) -> None:
    """Fill the folder `into`. `code`: a folder of modules that the config names; `excludes`: patterns of names in it.

    Raises ValueError when the code is no folder, or more than a job takes along.
    """
    if code is not None:
        _copy(code, into, (*EXCLUDES, *excludes))
    here = Path(__file__).resolve().parent.parent.parent
    for package in PACKAGES:
        if (into / package).exists():
            raise ValueError(f"--code: {code} has a folder {package!r}, the name of a part of nearfar; rename it")
        shutil.copytree(here / package, into / package, ignore=shutil.ignore_patterns("__pycache__", "*.pyc"))
    (into / CONFIG).write_text(dump_config(config), encoding="utf-8")
    write_json(into / REQUIREMENTS, _requirements())


def _requirements() -> list[str]:
    """What nearfar needs without its extras, as `name>=version`."""
    try:
        return [line for line in requires("nearfar") or () if "extra ==" not in line]
    except PackageNotFoundError:  # run from a folder of sources
        return []


def _copy(code: Path, into: Path, excludes: tuple[str, ...]) -> None:
    if not code.is_dir():
        raise ValueError(f"--code: {code} is no folder")
    sizes: dict[str, int] = {}
    total = 0
    for path in _files(code, excludes):
        relative = path.relative_to(code)
        sizes[str(relative)] = path.stat().st_size
        total += sizes[str(relative)]
        if total > MOST_BYTES:
            largest = sorted(sizes, key=lambda name: -sizes[name])[:3]
            told = ", ".join(f"{name} ({sizes[name] / 2**20:.0f} MiB)" for name in largest)
            raise ValueError(
                f"--code: {code} holds more than the {MOST_BYTES // 2**20} MiB that a job takes along; the largest: {told}; "
                "leave them out with --exclude, or name a folder that holds code only"
            )
        target = into / relative
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(path, target)


def _files(folder: Path, excludes: tuple[str, ...]) -> Iterator[Path]:
    """Files below `folder`, in order, whose names and whose folders' names no pattern catches."""

    def left_out(name: str) -> bool:
        return any(fnmatch.fnmatch(name, pattern) for pattern in excludes)

    for parent, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not left_out(name))
        yield from (Path(parent, name) for name in sorted(files) if not left_out(name))
