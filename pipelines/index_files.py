"""Where the manifest of an index goes, and putting it there all at once."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pyarrow.parquet

from pipelines.manifest import Manifest
from pipelines.remote import is_url


def choose_out(out: Path | None, tars: Sequence[str]) -> Path:
    """The folder for the manifest, by default that of the tars.

    Raises ValueError when there is no such one, or when it holds another data set than an index of the first of these tars.
    """
    if out is None:
        folders = sorted({os.path.dirname(tar) for tar in tars})
        if len(folders) > 1 or is_url(folders[0]):
            where = "are remote" if is_url(folders[0]) else f"lie in {len(folders)} folders ({folders[0]}, {folders[1]}, ...)"
            raise ValueError(f"the tars {where}: say with --out DIR where their manifest goes")
        out = Path(folders[0])
    out = out.absolute()
    if out.exists() and not out.is_dir():
        raise ValueError(f"{str(out)!r} is no folder: give another one with --out DIR")
    if (out / "manifest.json").exists():
        _require_same_tars(out, tars)
    return out


def url_from(out: Path, tar: str) -> str:
    """What the manifest in `out` calls a tar: relative where it lies below."""
    return Path(tar).relative_to(out).as_posix() if not is_url(tar) and Path(tar).is_relative_to(out) else tar


@contextmanager
def replaced_manifest(out: Path) -> Iterator[Path]:
    """A temporary folder whose files replace those of the same names in `out` at the end; on failure `out` stays as it was."""
    temporary, existed = out / f".index-{os.getpid()}.tmp", out.exists()
    try:
        temporary.mkdir(parents=True)
    except OSError as error:
        raise RuntimeError(
            f"cannot make a folder in {str(out)!r}: {error.strerror}; give another one with --out DIR"
        ) from error
    try:
        yield temporary
        # Without manifest.json there is no data set: between the first and the last of these steps nobody reads a mixture.
        (out / "manifest.json").unlink(missing_ok=True)
        for entry in sorted(temporary.iterdir(), key=lambda entry: entry.name == "manifest.json"):
            if entry.is_dir() and (out / entry.name).is_dir():
                shutil.rmtree(out / entry.name)
            os.replace(entry, out / entry.name)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if not existed and out.exists() and not any(out.iterdir()):
            out.rmdir()


def _require_same_tars(out: Path, tars: Sequence[str]) -> None:
    manifest = Manifest.open(out)
    if manifest.made_by != "index":
        raise ValueError(f"{str(out)!r} holds a packed data set, with a manifest already: give another folder with --out DIR")
    urls = pyarrow.parquet.read_table(out / "shards.parquet", columns=["url"])["url"].to_pylist()
    have = [url if is_url(url) else str(out / url) for url in urls]
    if list(tars[: len(have)]) != have:
        raise ValueError(
            f"{str(out)!r} holds a manifest of other tars ({have[0]}, ...): give another folder with --out DIR, or these tars "
            "first and new ones behind them"
        )
