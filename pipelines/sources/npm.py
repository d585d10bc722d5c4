"""Packages of the npm registry, through the npm client, kept in the user's cache folder."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from pipelines.sources.fetched import Progress

TIMEOUT_S = 900
INSTEAD = "or use the digits, which need no network (`nearfar demo --data digits`, `nearfar fetch digits OUT`)"
_NOT_TELLING = ("code ", "errno ", "syscall ", "a complete log")


def cache_folder(cache: Path | None = None) -> Path:
    """The given folder, or nearfar's own in the user's cache."""
    if cache is not None:
        return cache
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "nearfar"


def download(packages: Sequence[str], cache: Path | None = None, progress: Progress | None = None) -> list[Path]:
    """The tarballs of `name@version` packages, side by side; what is cached already is not asked for again.

    Raises RuntimeError without npm, without a network, or when there is no such package.
    """
    folder = cache_folder(cache)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RuntimeError(f"cannot make the cache folder {str(folder)!r}: {error.strerror}; set XDG_CACHE_HOME") from error
    missing = [package for package in packages if not (folder / tarball_name(package)).is_file()]
    done = len(packages) - len(missing)
    if progress is not None:
        progress(done, len(packages))
    if missing and shutil.which("npm") is None:
        raise RuntimeError(f"the images come from the npm registry, and there is no `npm` here: install Node.js, {INSTEAD}")
    with ThreadPoolExecutor(max(1, len(missing)), thread_name_prefix="nearfar-npm") as pool:
        for finished in as_completed([pool.submit(_pack, package, folder) for package in missing]):
            finished.result()
            done += 1
            if progress is not None:
                progress(done, len(packages))
    return [folder / tarball_name(package) for package in packages]


def tarball_name(package: str) -> str:
    """The file name that `npm pack` gives: `@scope/name@1.0` is `scope-name-1.0.tgz`."""
    name, _, version = package.rpartition("@")
    return f"{name.lstrip('@').replace('/', '-')}-{version}.tgz"


def _pack(package: str, folder: Path) -> None:
    """One package into `folder`, under its name only when it is complete: npm checks its hash first."""
    # A folder of its own, where no project's settings are picked up and where only what npm wrote lies.
    with tempfile.TemporaryDirectory(prefix="npm-", dir=folder) as temporary:
        command = ["npm", "pack", package, "--loglevel=error", "--fetch-retries=2", "--fetch-retry-factor=2"]
        try:
            result = subprocess.run(
                [*command, "--fetch-retry-mintimeout=1000", "--fetch-retry-maxtimeout=5000"],
                cwd=temporary,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=TIMEOUT_S,
            )
        except subprocess.TimeoutExpired:
            raise RuntimeError(f"npm took more than {TIMEOUT_S // 60} minutes for {package}: try again, {INSTEAD}") from None
        tarball = Path(temporary) / tarball_name(package)
        if result.returncode or not tarball.is_file():
            raise RuntimeError(f"npm could not fetch {package} ({explain(result.stderr)}): check the network, {INSTEAD}")
        os.replace(tarball, folder / tarball.name)


def explain(stderr: str) -> str:
    """The line of npm's error output that tells what happened."""
    errors = [re.sub(r"^npm (error|ERR!)\s*", "", line) for line in stderr.splitlines() if re.match(r"npm (error|ERR!)", line)]
    telling = [line for line in errors if line.strip() and not line.lower().startswith(_NOT_TELLING)]
    return telling[0].strip() if telling else "no reason given"
